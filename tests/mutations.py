"""Damaged image files, each made from a seed, for tests and for `python -m benchmarks.fuzz`."""

import io
import random
import struct
import zlib
from functools import lru_cache

from PIL import Image


@lru_cache(maxsize=1)
def originals() -> tuple[bytes, ...]:
    """A small image in every accepted format, and in modes that need conversion."""
    gray = Image.radial_gradient("L").resize((48, 40))
    kinds = [
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
    ]
    files = []
    for image, file_format, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, file_format, **options)
        files.append(buffer.getvalue())
    return tuple(files)


def mutated(seed: int) -> bytes:
    """One of the originals with bytes flipped, cut, doubled, or replaced by extreme numbers."""
    g = random.Random(seed)
    data = bytearray(g.choice(originals()))
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


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG file of a few bytes whose header promises any number of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
