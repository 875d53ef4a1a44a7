import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from apt_ray.errors import DataError, ImageError, ImageTooLargeError, UnsupportedImageError
from apt_ray.images import (
    ImageLimits,
    cover,
    decode_image,
    draw_overlay,
    encode_png,
    read_image,
    read_mask,
    read_region,
)
from tests.mutations import with_damaged_metadata

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def two_colours() -> Image.Image:
    """Left half red, right half green."""
    image = Image.new("RGB", (32, 16), RED)
    image.paste(GREEN, (16, 0, 32, 16))
    return image


def near(colour: object, expected: tuple[int, int, int]) -> bool:
    return bool(np.abs(np.subtract(colour, expected)).max() <= 12)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_accepted_formats_become_rgb(file_format: str) -> None:
    image = decode_image(encoded(two_colours(), file_format))
    assert (image.mode, image.size) == ("RGB", (32, 16))
    assert near(image.getpixel((4, 8)), RED)
    assert near(image.getpixel((28, 8)), GREEN)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn clockwise by a quarter to view
    image = decode_image(encoded(two_colours(), file_format, exif=exif))
    assert image.size == (16, 32)
    assert near(image.getpixel((8, 4)), RED)
    assert near(image.getpixel((8, 28)), GREEN)


def exif_with(orientation: int, *, rational: tuple[int, int], maker: int) -> bytes:
    """EXIF with an orientation, a resolution, and a maker's name of so many letters, which
    lie outside of the file if they are more than four."""
    entries = [
        struct.pack("<HHII", 0x10F, 2, maker, 60_000),
        struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0),
        struct.pack("<HHII", 0x11A, 10, 1, 8 + 2 + 3 * 12 + 4),
    ]
    directory = struct.pack("<H", 3) + b"".join(entries) + struct.pack("<I", 0)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + directory + struct.pack("<ii", *rational)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_orientation_is_applied_beside_a_number_that_is_none(file_format: str) -> None:
    exif = exif_with(6, rational=(-1, 0), maker=4)
    image = decode_image(encoded(two_colours(), file_format, exif=exif))
    assert image.size == (16, 32)
    assert near(image.getpixel((8, 4)), RED)


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0Exif\0\0MM\0*",
        b"Exif\0\0garbage" * 3,
        exif_with(1, rational=(1, 1), maker=500),
    ],
)
def test_exif_that_cannot_be_read_counts_as_absent(file_format: str, exif: bytes) -> None:
    image = decode_image(encoded(two_colours(), file_format, exif=exif))
    assert (image.size, near(image.getpixel((4, 8)), RED)) == ((32, 16), True)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.filterwarnings("ignore")  # Pillow's remarks on damaged files
def test_sound_pixels_are_read_whatever_their_metadata(seed: int) -> None:
    assert sorted(decode_image(with_damaged_metadata(seed)).size) == [40, 48]


@pytest.mark.parametrize("place", ["before the pixels", "behind them"])
def test_texts_and_profiles_of_a_png_fill_no_memory(place: str) -> None:
    plain = encoded(two_colours(), "PNG")
    packed = zlib.compress(bytes(10_000_000))
    chunks = [(b"zTXt", b"Comment\0\0" + packed), (b"iCCP", b"profile\0\0" + packed)]
    texts = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", 0)  # a wrong check sum
        for kind, content in chunks * 50
    )
    position = 33 if place == "before the pixels" else len(plain) - 12
    data = plain[:position] + texts + plain[position:]
    tracemalloc.start()
    image = decode_image(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert image.tobytes() == two_colours().tobytes()
    assert peak < 5_000_000  # half of one text


def test_a_tiff_whose_xmp_is_a_text() -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[700] = 2
    tags[700] = "<x:xmpmeta/>"
    assert decode_image(encoded(two_colours(), "TIFF", tiffinfo=tags)).size == (32, 16)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("name", ["part.png", "part.jpg"])
def test_the_name_of_a_file_does_not_matter(tmp_path: Path, file_format: str, name: str) -> None:
    (tmp_path / name).write_bytes(encoded(two_colours(), file_format))
    assert near(read_image(tmp_path / name).getpixel((4, 8)), RED)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bit_gray_is_scaled_not_clipped(file_format: str) -> None:
    levels = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    image = decode_image(encoded(Image.fromarray(levels), file_format))
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_big_endian_sixteen_bit_gray() -> None:
    entries = [(256, 4, 1), (257, 4, 1), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8)]
    entries += [(278, 4, 1), (279, 4, 2)]
    tags = b"".join(
        struct.pack(">HHI", tag, kind, 1) + struct.pack(">HH" if kind == 3 else ">I", *value)
        for tag, kind, number in entries
        for value in [(number, 0) if kind == 3 else (number,)]
    )
    pixels = struct.pack(">HH", 200 * 257, 0)
    directory = struct.pack(">H", len(entries)) + tags + struct.pack(">I", 0)
    image = decode_image(b"MM\0*" + struct.pack(">I", 12) + pixels + directory)
    assert image.getpixel((0, 0)) == (200, 200, 200)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    options = {}
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.putpixel((1, 0), 1)
        options = {"transparency": 1}
    decoded = decode_image(encoded(image.convert(mode), "PNG", **options))
    assert decoded.getpixel((0, 0)) == (0, 0, 0)
    assert decoded.getpixel((1, 0)) == WHITE


def test_palette_and_cmyk() -> None:
    assert decode_image(encoded(two_colours().quantize(4), "PNG")).getpixel((4, 8)) == RED
    assert near(
        decode_image(encoded(two_colours().convert("CMYK"), "JPEG")).getpixel((28, 8)), GREEN
    )


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_only_the_first_frame_counts(file_format: str) -> None:
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), GREEN)
    data = encoded(first, file_format, save_all=True, append_images=[second])
    assert near(decode_image(data).getpixel((4, 4)), RED)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_truncated_files_are_refused(file_format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), file_format)
    with pytest.raises(ImageError, match=r"part\.jpg is damaged"):
        decode_image(data[: int(len(data) * share)], source="part.jpg")


@pytest.mark.parametrize("data", [b"%PDF-1.7", b"<svg/>", b"\0\0\0\x18ftypheic"])
def test_other_file_types_are_refused(data: bytes) -> None:
    with pytest.raises(UnsupportedImageError, match="convert it"):
        decode_image(data)


@pytest.mark.parametrize("data", [b"", b"hello", b"RIFF0000WAVE"])
def test_bytes_that_are_no_image_are_refused(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert not isinstance(caught.value, UnsupportedImageError)


def test_formats_that_pillow_knows_but_we_do_not() -> None:
    with pytest.raises(UnsupportedImageError):
        decode_image(encoded(two_colours(), "GIF"))


def test_floating_point_pixels_are_refused() -> None:
    data = encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF")
    with pytest.raises(UnsupportedImageError, match="8 or 16 unsigned bits"):
        decode_image(data)


def test_byte_limit_is_inclusive() -> None:
    data = encoded(two_colours(), "PNG")
    decode_image(data, limits=ImageLimits(max_bytes=len(data)))
    with pytest.raises(ImageTooLargeError, match="bytes"):
        decode_image(data, limits=ImageLimits(max_bytes=len(data) - 1))


def test_pixel_limit_is_inclusive() -> None:
    data = encoded(two_colours(), "PNG")
    decode_image(data, limits=ImageLimits(max_pixels=32 * 16))
    with pytest.raises(ImageTooLargeError, match="32 x 16"):
        decode_image(data, limits=ImageLimits(max_pixels=32 * 16 - 1))


@pytest.mark.parametrize("side", [7_000, 10_000, 60_000])
def test_a_huge_header_is_refused_before_decoding(side: int) -> None:
    """Also where Pillow would warn, and where it would raise; the file has no pixels at all."""
    bmp = bytearray(encoded(two_colours(), "BMP")[:54])
    bmp[18:26] = struct.pack("<ii", side, side)
    with pytest.raises(ImageTooLargeError, match="pixels"):
        decode_image(bytes(bmp))


def test_read_image_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    with pytest.raises(DataError, match=r"cannot read .*broken\.png"):
        read_image(path)
    path.write_bytes(encoded(two_colours(), "PNG")[:60])
    with pytest.raises(DataError, match=r"broken\.png is damaged"):
        read_image(path)
    path.write_bytes(encoded(two_colours(), "PNG"))
    assert read_image(path).size == (32, 16)


PAINTED = np.zeros((24, 40), dtype=bool)
PAINTED[8:16, 16:32] = True


def _palette(*colours: int) -> Image.Image:
    image = Image.fromarray(PAINTED.astype(np.uint8)).convert("P")
    image.putpalette([*colours, *[0] * (768 - len(colours))])
    return image


def _stack(*channels: int) -> Image.Image:
    """One value a channel where the mask is painted; 0 elsewhere."""
    return Image.fromarray(PAINTED[..., None] * np.array(channels, np.uint8))


def _on_clear(*channels: int, ground: int) -> Image.Image:
    """A layer that is clear, over a gray of `ground`, where nothing is painted."""
    colours = np.where(PAINTED[..., None], np.array(channels), ground)
    return Image.fromarray(np.dstack([colours, PAINTED * 255]).astype(np.uint8))


MASKS: dict[str, tuple[Image.Image, str, dict[str, object]]] = {
    "1 bit": (Image.fromarray(PAINTED), "PNG", {}),
    "1 of 255": (Image.fromarray(PAINTED.astype(np.uint8)), "PNG", {}),
    "128 of 255": (Image.fromarray(PAINTED.astype(np.uint8) * 128), "PNG", {}),
    "255 of 255": (Image.fromarray(PAINTED.astype(np.uint8) * 255), "PNG", {}),
    "1 of 65535": (Image.fromarray(PAINTED.astype(np.uint16)), "PNG", {}),
    "1 of 65535 in a TIFF": (Image.fromarray(PAINTED.astype(np.uint16)), "TIFF", {}),
    "256 of 65535": (Image.fromarray(PAINTED.astype(np.uint16) * 256), "PNG", {}),
    "65535 of 65535": (Image.fromarray(PAINTED.astype(np.uint16) * 65535), "PNG", {}),
    "32 bits": (Image.fromarray(PAINTED.astype(np.int32)), "TIFF", {}),
    "floats": (Image.fromarray(PAINTED.astype(np.float32) / 100), "TIFF", {}),
    "palette": (_palette(0, 0, 0, 128, 0, 0), "PNG", {}),
    "palette of dark blue": (_palette(0, 0, 0, 0, 0, 1), "PNG", {}),
    "palette with a clear ground": (_palette(0, 0, 0, 0, 0, 1), "PNG", {"transparency": 0}),
    "palette in a BMP": (_palette(0, 0, 0, 128, 0, 0), "BMP", {}),
    "red": (_stack(255, 0, 0), "PNG", {}),
    "faint blue": (_stack(0, 0, 4), "BMP", {}),
    "opaque": (_stack(255, 255, 255).convert("RGBA"), "PNG", {}),
    "gray and opaque": (Image.fromarray(PAINTED.astype(np.uint8)).convert("LA"), "PNG", {}),
    "white on a clear white layer": (_on_clear(255, 255, 255, ground=255), "PNG", {}),
    "white on a clear layer": (_on_clear(255, 255, 255, ground=0), "PNG", {}),
    "red on a clear layer": (_on_clear(255, 0, 0, ground=0), "WEBP", {"lossless": True}),
    "black on a clear layer": (_on_clear(0, 0, 0, ground=0), "PNG", {}),
    "JPEG": (Image.fromarray(PAINTED.astype(np.uint8) * 255), "JPEG", {"quality": 60}),
    "gray JPEG": (Image.fromarray(PAINTED.astype(np.uint8) * 128), "JPEG", {"quality": 80}),
    "WebP": (Image.fromarray(PAINTED.astype(np.uint8) * 255), "WEBP", {"quality": 80}),
    "CMYK": (_stack(255, 255, 255).convert("CMYK"), "TIFF", {}),
    "compressed TIFF": (Image.fromarray(PAINTED), "TIFF", {"compression": "group4"}),
}


@pytest.mark.parametrize(("image", "file_format", "options"), MASKS.values(), ids=MASKS)
def test_a_mask_is_true_where_it_is_painted(
    tmp_path: Path, image: Image.Image, file_format: str, options: dict[str, object]
) -> None:
    path = tmp_path / "mask"
    image.save(path, file_format, **options)
    mask_HW = read_mask(path, (40, 24))
    assert mask_HW.dtype == np.bool_
    lossy = file_format in ("JPEG", "WEBP")
    assert (mask_HW != PAINTED).sum() <= (4 if lossy else 0)


@pytest.mark.parametrize("name", [name for name in MASKS if name != "black on a clear layer"])
def test_a_region_of_interest_is_what_is_painted(tmp_path: Path, name: str) -> None:
    image, file_format, options = MASKS[name]
    path = tmp_path / "region"
    image.save(path, file_format, **options)
    assert (read_region(path) != PAINTED).sum() <= (4 if file_format in ("JPEG", "WEBP") else 0)


def test_a_hole_in_a_black_layer_is_a_region_of_interest(tmp_path: Path) -> None:
    path = tmp_path / "region.png"
    hole = np.dstack([np.zeros((*PAINTED.shape, 3)), ~PAINTED * 255]).astype(np.uint8)
    Image.fromarray(hole).save(path)
    np.testing.assert_array_equal(read_region(path), PAINTED)


@pytest.mark.parametrize("colour", [(0, 0, 0, 255), (0, 0, 0, 0), (255, 255, 255, 0)])
def test_a_region_of_interest_without_anything_is_refused(
    tmp_path: Path, colour: tuple[int, int, int, int]
) -> None:
    path = tmp_path / "region.png"
    Image.new("RGBA", (40, 24), colour).save(path)
    with pytest.raises(DataError, match=r"region\.png leaves nothing .*: paint white"):
        read_region(path)


def test_masks_lie_as_their_images_do(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn clockwise by a quarter to view
    path = tmp_path / "mask.png"
    Image.fromarray(PAINTED).save(path, exif=exif)
    upright = np.rot90(PAINTED, -1)
    np.testing.assert_array_equal(read_region(path), upright)
    np.testing.assert_array_equal(read_mask(path, (24, 40)), upright)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (24, 40), (7, 100), (256, 2)])
def test_a_mask_at_another_size_holds_whatever_it_touches(size: tuple[int, int]) -> None:
    for y, x in [(0, 0), (11, 17), (23, 39)]:
        mask_HW = np.zeros((24, 40), np.bool_)
        mask_HW[y, x] = True
        # Of each cell, whether its half-open span and that of the pixel have more than a border
        # in common, in units of 1 / (pixels x cells).
        rows, columns = (
            [
                cell * length < (place + 1) * cells and place * cells < (cell + 1) * length
                for cell in range(cells)
            ]
            for place, length, cells in zip((y, x), mask_HW.shape, size, strict=True)
        )
        np.testing.assert_array_equal(cover(mask_HW, size), np.outer(rows, columns))


def test_a_folder_of_masks_is_read_as_one(tmp_path: Path) -> None:
    for name, rows in (("000.png", slice(8, 12)), ("001.bmp", slice(12, 16))):
        layer = np.zeros_like(PAINTED)
        layer[rows] = PAINTED[rows]
        Image.fromarray(layer).save(tmp_path / name)
    (tmp_path / "._000.png").write_bytes(b"what macOS leaves")
    np.testing.assert_array_equal(read_mask(tmp_path, (40, 24)), PAINTED)
    np.testing.assert_array_equal(read_mask(str(tmp_path), (40, 24)), PAINTED)


@pytest.mark.parametrize(
    ("image", "file_format"),
    [
        (Image.new("L", (40, 24)), "PNG"),
        (Image.new("1", (40, 24)), "TIFF"),
        (Image.new("RGB", (40, 24)), "JPEG"),
        (Image.new("L", (40, 24), 8), "JPEG"),
        (Image.new("RGBA", (40, 24)), "PNG"),
        (Image.new("RGBA", (40, 24), "black"), "PNG"),
        (Image.new("RGBA", (40, 24), (255, 255, 255, 0)), "PNG"),
    ],
)
def test_a_mask_without_paint_is_refused(
    tmp_path: Path, image: Image.Image, file_format: str
) -> None:
    folder = tmp_path / "000"
    folder.mkdir()
    with pytest.raises(DataError, match=r"nothing is painted in the mask .*000,"):
        read_mask(folder, (40, 24))
    path = folder / "mask.png"
    image.save(path, file_format)
    for mask in (path, folder):
        with pytest.raises(DataError, match=rf"nothing is painted in the mask {mask}, .*: paint"):
            read_mask(mask, (40, 24))


def test_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.new("L", (5, 3)).save(path)
    with pytest.raises(DataError, match=r"mask .*mask\.png is 5 x 3 pixels but its image is 3 x 5"):
        read_mask(path, (3, 5))


def test_damaged_mask_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    path.write_bytes(encoded(Image.fromarray(noise), "PNG")[:500])
    with pytest.raises(DataError, match=r"mask\.png is damaged"):
        read_mask(path, (64, 64))


def test_overlay_of_a_zero_map_is_the_image() -> None:
    image = two_colours()
    overlay = draw_overlay(image, np.zeros((16, 32), np.float32), threshold=0.5)
    np.testing.assert_array_equal(np.asarray(overlay), np.asarray(image))


def test_overlay_grows_with_the_map_and_leaves_the_image_visible() -> None:
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (8, 1))
    white = Image.new("RGB", (64, 8), WHITE)
    black = Image.new("RGB", (64, 8))
    over_white = np.asarray(draw_overlay(white, ramp, threshold=1.0), int)
    over_black = np.asarray(draw_overlay(black, ramp, threshold=1.0), int)
    contrast = (over_white - over_black).mean(axis=(0, 2))  # what is left of the image
    assert np.all(np.diff(contrast) <= 0)
    assert contrast[0] == 255
    assert contrast[-1] > 50


def test_overlay_outlines_the_area_above_the_threshold_from_outside() -> None:
    anomaly_map = np.zeros((40, 40), np.float32)
    anomaly_map[20, 20] = 0.6
    gray = Image.new("RGB", (40, 40), (128, 128, 128))
    overlay = np.asarray(draw_overlay(gray, anomaly_map, threshold=0.5))
    assert tuple(overlay[20, 21]) == WHITE
    assert tuple(overlay[20, 22]) == (0, 0, 0)
    assert tuple(overlay[20, 24]) == (128, 128, 128)
    assert tuple(overlay[20, 20]) not in {WHITE, (0, 0, 0), (128, 128, 128)}
    below = np.asarray(draw_overlay(gray, anomaly_map, threshold=0.6))
    assert tuple(below[20, 21]) == (128, 128, 128)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (700, 2)])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_overlay_of_any_size(size: tuple[int, int], threshold: float) -> None:
    ones = np.ones(size[::-1], np.float32)
    assert draw_overlay(Image.new("L", size), ones, threshold=threshold).size == size


def test_overlay_needs_a_map_of_the_images_size() -> None:
    with pytest.raises(ValueError, match=r"\(32, 16\)"):
        draw_overlay(two_colours(), np.zeros((32, 16), np.float32), threshold=0.5)


def test_encode_png_round_trip() -> None:
    image = two_colours()
    np.testing.assert_array_equal(np.asarray(decode_image(encode_png(image))), np.asarray(image))
