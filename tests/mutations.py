"""Damaged input, each made from a seed, for tests and for `python -m benchmarks.fuzz`.

Image files with damage anywhere, or in their metadata alone; mask files; multipart forms.
"""

import io
import random
import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageCms, TiffImagePlugin

# Tags of a TIFF: description, XMP, colour profile; and types that a writer may give them.
_TIFF_TAGS = (270, 700, 34675)
_TIFF_TYPES = (1, 2, 7)
# Chunks of a PNG that are a few numbers, as they should be.
_NUMBERS = {
    b"pHYs": struct.pack(">IIB", 2835, 2835, 1),
    b"gAMA": struct.pack(">I", 45455),
    b"cHRM": struct.pack(">8I", *range(31270, 31278)),
    b"tIME": struct.pack(">H5B", 2026, 1, 2, 3, 4, 5),
    b"sRGB": b"\0",
}


@lru_cache(maxsize=1)
def originals() -> tuple[bytes, ...]:
    """A small image in every accepted format, and in modes that need conversion."""
    gray = Image.radial_gradient("L").resize((48, 40))
    deep = gray.convert("I").point(lambda value: value * 257).convert("I;16")
    kinds: list[tuple[Image.Image, str, dict[str, object]]] = [
        (gray.convert("RGB"), "PNG", {}),
        (gray.convert("P"), "PNG", {}),
        (gray.convert("RGBA"), "PNG", {"compress_level": 0}),
        (gray.convert("RGB"), "JPEG", {"quality": 80}),
        (gray.convert("CMYK"), "JPEG", {"progressive": True}),
        (gray, "BMP", {}),
        (gray.convert("RGB"), "TIFF", {}),
        (gray.convert("RGB"), "TIFF", {"compression": "tiff_lzw"}),
        (gray.convert("RGB"), "WEBP", {"lossless": True}),
        (gray.convert("RGBA"), "WEBP", {"quality": 60}),
        (deep, "PNG", {}),
        (deep, "TIFF", {}),
        (deep, "TIFF", {"compression": "tiff_lzw"}),
    ]
    return tuple(_saved(image, file_format, options) for image, file_format, options in kinds)


@lru_cache(maxsize=1)
def masks() -> tuple[bytes, ...]:
    """A mask of 48 x 40 pixels in every format and mode that masks come in."""
    gray = Image.new("L", (48, 40))
    gray.paste(255, (10, 8, 30, 20))
    clear = Image.merge("LA", (gray, gray))
    kinds: list[tuple[Image.Image, str, dict[str, object]]] = [
        *((gray.convert(mode), "PNG", {}) for mode in ("1", "L", "P", "RGB", "I;16")),
        (clear, "PNG", {}),
        (clear.convert("RGBA"), "PNG", {}),
        (gray, "JPEG", {"quality": 80}),
        (gray.convert("1"), "BMP", {}),
        (gray.convert("P"), "BMP", {}),
        (gray.convert("1"), "TIFF", {"compression": "group4"}),
        (gray, "TIFF", {"compression": "tiff_lzw"}),
    ]
    return tuple(_saved(image, file_format, options) for image, file_format, options in kinds)


def mutated(seed: int) -> bytes:
    """One of the originals with bytes flipped, cut, doubled, or replaced by extreme numbers."""
    return _mutated_one_of(originals(), seed)


def mutated_mask(seed: int) -> bytes:
    """One of the masks, damaged in the same way."""
    return _mutated_one_of(masks(), seed)


def with_damaged_metadata(seed: int) -> bytes:
    """A sound image whose EXIF, XMP, text, colour profile or further PNG chunks are not.

    Its metadata is framed as the format wants it, with true lengths and check sums.
    """
    g = random.Random(seed)
    image = Image.radial_gradient("L").resize((48, 40)).convert("RGB")
    exif = _payload(g, b"Exif\0\0" + _exif())
    profile = _payload(g, _profile())
    file_format = g.choice(("PNG", "PNG", "JPEG", "WEBP", "TIFF"))
    if file_format == "TIFF":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        for tag in g.sample(_TIFF_TAGS, g.randint(1, 3)):
            tags.tagtype[tag] = g.choice(_TIFF_TYPES)
            tags[tag] = _payload(g, b'<x tiff:Orientation="6"/>') if tag == 700 else profile
        return _saved(image, "TIFF", {"tiffinfo": tags})
    if file_format != "PNG":
        # One segment of a JPEG has 64 KB, and Pillow refuses to write a longer EXIF.
        given = {"exif": exif[:65_000], "icc_profile": profile}
        chosen = g.sample(sorted(given), g.randint(1, 2))
        return _saved(image, file_format, {name: given[name] for name in chosen})
    plain = _saved(image, "PNG", {})
    chunks = b"".join(_ancillary_chunk(g, exif, profile) for _ in range(g.randint(1, 4)))
    # After the header, or after the pixels, before the end.
    place = g.choice((33, len(plain) - 12))
    return plain[:place] + chunks + plain[place:]


def form(files: Sequence[bytes], boundary: bytes = b"x") -> bytes:
    """A multipart form of these files."""
    head = b'Content-Disposition: form-data; name="image"; filename="part.png"'
    parts = [b"--" + boundary + b"\r\n" + head + b"\r\n\r\n" + file + b"\r\n" for file in files]
    return b"".join(parts) + b"--" + boundary + b"--\r\n"


def cut_form(seed: int) -> tuple[str, bytes]:
    """Content type and body of a form of sound images that lost its end."""
    g = random.Random(seed)
    whole = form(g.sample(originals(), g.randint(1, 4)))
    lost = g.choice((g.randint(3, 12), g.randrange(3, len(whole))))  # the last two are a line's end
    return "multipart/form-data; boundary=x", whole[:-lost]


def damaged_form(seed: int) -> tuple[str, bytes]:
    """Content type and body of a form with damage in its structure, its headers or its type."""
    g = random.Random(seed)
    boundary = g.choice(
        (b"x", b"----WebKitFormBoundary7MA4YWxkTrZu0gW", b"a'()+_,-./:=?", b"x" * 256)
    )
    body = form(
        [g.choice((*originals(), b"")) for _ in range(g.choice((1, 1, 2, 5, 20)))], boundary
    )
    names = (b'filename="part.png"', b'name="image"', b"form-data", b"Content-Disposition")
    others = (
        *(b"", b"filename=", b'filename="\xfc\xff"', b"filename*=UTF-8''%ff%fe", b'name="', b";;;"),
        *(b'name="a"\r\nContent-Type: \xff/\0', b"Content-Transfer-Encoding: base64\r\nX", b":"),
        *(b"X: " + b"y" * 9000, b"\r\n".join(b"X: y" for _ in range(100)), b"\r\n\r\n"),
    )
    if g.random() < 0.5:
        body = body.replace(g.choice(names), g.choice(others), g.choice((1, 1, -1)))
    if g.random() < 0.6:
        places = [place for place in range(len(body)) if body.startswith(b"--" + boundary, place)]
        start = g.choice(places) if places else 0
        body = body[:start] + _mutated(g, body[start : start + 200]) + body[start + 200 :]
    charset = g.choice(
        ("", "", "", "utf-8", "latin-1", "utf-16", "idna", "undefined", "rot13", "\xff")
    )
    named = g.choice((boundary.decode(), f'"{boundary.decode()}"', "", "other", '"'))
    if g.random() < 0.8:
        named = f'"{boundary.decode()}"'
    return f"multipart/form-data; boundary={named}" + (charset and f"; charset={charset}"), body


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG file of a few bytes whose header promises any number of pixels."""

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", data)
        + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _saved(image: Image.Image, file_format: str, options: dict[str, object]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _mutated_one_of(files: Sequence[bytes], seed: int) -> bytes:
    g = random.Random(seed)
    return _mutated(g, g.choice(files))


def _mutated(g: random.Random, original: bytes) -> bytes:
    data = bytearray(original)
    for _ in range(g.choice((1, 1, 2, 4, 16))):
        place = g.randrange(len(data)) if g.random() < 0.5 else g.randrange(min(80, len(data)))
        length = g.choice((1, 2, 4, 8))
        kind = g.randrange(5)
        if kind == 0:
            data[place] ^= 1 << g.randrange(8)
        elif kind == 1:
            data[place : place + length] = g.choice((b"\0", b"\xff", b"\x7f")) * length
        elif kind == 2:
            del data[place : place + g.choice((1, 4, 64, 4096))]
        elif kind == 3:
            data[place:place] = data[place : place + g.choice((1, 4, 64))]
        else:
            data[place : place + length] = g.randbytes(length)
        if not data:
            break
    return bytes(data)


@lru_cache(maxsize=1)
def _exif() -> bytes:
    """EXIF with an orientation, rationals, texts and a GPS folder, without its prefix."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x011A] = exif[0x011B] = 72.5
    exif[0x010F] = "a camera"
    exif.get_ifd(0x8825)[2] = (48.0, 8.0, 0.5)
    exif.get_ifd(0x8769)[0x9003] = "2026:01:02 03:04:05"
    return exif.tobytes().removeprefix(b"Exif\0\0")


@lru_cache(maxsize=1)
def _profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _payload(g: random.Random, sound: bytes) -> bytes:
    """Metadata as it should be, damaged, cut, of noise, or far too long."""
    kind = g.randrange(8)
    if kind == 0:
        return sound
    if kind == 1:
        return sound[: g.randrange(len(sound))]
    if kind == 2:
        return g.randbytes(g.choice((1, 7, 300)))
    if kind == 3:
        return sound + bytes(g.choice((60_000, 2_000_000)))
    return _mutated(g, sound)


def _ancillary_chunk(g: random.Random, exif: bytes, profile: bytes) -> bytes:
    """A chunk that says nothing of the pixels: damaged within, or of a kind that nobody knows."""
    kind = g.choice((b"eXIf", b"iCCP", b"tEXt", b"zTXt", b"iTXt", *_NUMBERS, b"ruSt"))
    text = _payload(g, b"a part, photographed on Friday")
    if kind == b"eXIf":
        content = exif.removeprefix(b"Exif\0\0")
    elif kind == b"iCCP":
        content = b"profile\0\0" + _packed(g, profile)
    elif kind == b"tEXt":
        content = g.choice((b"Comment\0", b"", b"\0", b"k" * 200)) + text
    elif kind == b"zTXt":
        content = g.choice((b"Comment\0\0", b"Comment\0\x07", b"Comment")) + _packed(g, text)
    elif kind == b"iTXt":
        starts = (b"Title\0\1\0de\0T\xc3\0", b"Title\0\0\0\0\0", b"Title\0\1", b"")
        content = g.choice(starts) + _packed(g, text)
    else:
        content = _payload(g, _NUMBERS.get(kind, b"?"))
    return _chunk(kind, content[: g.choice((len(content), len(content), g.randrange(50)))])


def _packed(g: random.Random, content: bytes) -> bytes:
    """Compressed, or in its place a few bytes that become megabytes, or what was never packed."""
    kind = g.randrange(3)
    return content if kind == 0 else _bomb() if kind == 1 else zlib.compress(content, level=1)


@lru_cache(maxsize=1)
def _bomb() -> bytes:
    return zlib.compress(bytes(4_000_000))
