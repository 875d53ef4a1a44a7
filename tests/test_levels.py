"""16-bit files of cameras with fewer bits: whatever says what is white, and what nobody says."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from apt_ray.config import FitSettings
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import DataError, SettingsError, UnsupportedImageError
from apt_ray.images import decode_image, find_reading, read_image, read_mask
from apt_ray.levels import FORMER, Reading
from apt_ray.prompts.fit import fit
from tests.fakes import FakeBackbone

RAMP = np.linspace(0, 1, 15).reshape(3, 5)


def png(samples: NDArray[np.integer], bits: int | None = None, *, key: bytes = b"") -> bytes:
    """A 16-bit PNG of (H, W) or (H, W, C), with `sBIT` where `bits` is given."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    channels = 1 if samples.ndim == 2 else samples.shape[2]
    rows = samples.astype(">u2").reshape(len(samples), -1)
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 16, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"sBIT", bytes([bits] * channels)) if bits else b"")
        + (chunk(b"tRNS", key) if key else b"")
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
        + chunk(b"IEND", b"")
    )


def tiff(samples: NDArray[np.uint16], **tags: int) -> bytes:
    """A 16-bit gray TIFF with further tags: `t` and their number."""
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        directory[int(name[1:])] = value
    buffer = io.BytesIO()
    Image.fromarray(samples).save(buffer, "TIFF", tiffinfo=directory)
    return buffer.getvalue()


def gray(white: int, share: float = 1.0) -> NDArray[np.uint16]:
    return np.rint(RAMP * white * share).astype(np.uint16)


def assert_ramp(image: Image.Image) -> None:
    values = np.asarray(image, int)
    assert np.abs(values - np.rint(RAMP * 255)[..., None]).max() <= 1


@pytest.mark.parametrize("white", [1023, 4095, 16383, 65535])
def test_the_file_says_what_is_white(white: int) -> None:
    bits = white.bit_length()
    assert_ramp(decode_image(png(gray(white), bits)))
    assert_ramp(decode_image(png(np.dstack([gray(white)] * 3), bits)))
    assert_ramp(decode_image(tiff(gray(white), t281=white)))
    assert_ramp(decode_image(tiff(gray(white), t50717=white)))


def test_samples_that_fill_sixteen_bits_as_png_wants_it_stay_as_they_are() -> None:
    assert_ramp(decode_image(png(gray(4095) * 16 + gray(4095) // 256, 12)))


def test_a_statistic_is_no_white_level() -> None:
    with pytest.raises(UnsupportedImageError, match=r"no sample above 3000.*MaxSampleValue"):
        decode_image(tiff(gray(3000), t281=3000))
    assert_ramp(decode_image(tiff(gray(15520), t50717=15520)))


@pytest.mark.parametrize("white", [1023, 4095])
def test_a_dark_file_that_does_not_say_is_an_error_without_a_reading(white: int) -> None:
    for samples in (gray(white), np.dstack([gray(white)] * 3)):
        with pytest.raises(UnsupportedImageError, match="does not say which is white"):
            decode_image(png(samples))
        assert_ramp(decode_image(png(samples), reading=Reading(white_level=white)))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize("white", [4095, 65535])
def test_white_is_zero_is_inverted(compression: str, white: int) -> None:
    buffer = io.BytesIO()
    Image.fromarray(white - gray(white)).save(buffer, "TIFF", compression=compression)
    data = _with_photometric(buffer.getvalue(), 0)
    assert_ramp(decode_image(data, reading=Reading(white_level=white)))


def _with_photometric(data: bytes, value: int) -> bytes:
    """Pillow writes its own; this changes it in a little-endian file."""
    (start,) = struct.unpack("<I", data[4:8])
    (count,) = struct.unpack("<H", data[start : start + 2])
    changed = bytearray(data)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack("<H", data[entry : entry + 2]) == (262,):
            changed[entry + 8 : entry + 10] = struct.pack("<H", value)
    return bytes(changed)


def test_a_mask_whose_white_is_zero(tmp_path: Path) -> None:
    mask = np.zeros((3, 5), np.bool_)
    mask[1, 2] = True
    path = tmp_path / "mask.tif"
    path.write_bytes(_with_photometric(tiff(np.where(mask, 0, 65535).astype(np.uint16)), 0))
    np.testing.assert_array_equal(read_mask(path, (5, 3)), mask)
    path.write_bytes(png(np.dstack([mask.astype(np.uint16)] * 3)))
    np.testing.assert_array_equal(read_mask(path, (5, 3)), mask)


@pytest.mark.parametrize(
    ("samples", "tags", "says"),
    [
        (np.zeros((2, 2), np.uint16), {339: 2}, "signed samples of 16"),
        (np.zeros((2, 2), np.uint8), {339: 2}, "signed samples of 8"),
        (np.zeros((2, 2), np.int32), {}, "signed samples of 32"),
        (np.zeros((2, 2), np.float32), {}, "floating-point samples of 32"),
        (np.zeros((2, 2, 3), np.uint8), {258: (64, 64, 64), 339: 3}, "floating-point samples of"),
    ],
)
def test_other_samples_are_named(
    samples: NDArray[np.generic], tags: dict[int, object], says: str
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(samples).save(buffer, "TIFF", tiffinfo=tags)
    with pytest.raises(UnsupportedImageError, match=f"has {says}.* save it with 8 or 16 unsigned"):
        decode_image(buffer.getvalue())


def test_colour_and_alpha_of_sixteen_bits_lie_on_the_ground() -> None:
    clear = np.zeros((3, 5), np.uint16)
    for channels in (1, 3):
        samples = np.dstack([gray(65535)] * channels + [clear])
        for ground, value in (("white", 255), ("black", 0), ("gray", 128)):
            image = decode_image(png(samples), reading=Reading(ground=ground))
            assert image.getcolors() == [(15, (value,) * 3)]
        samples[..., -1] = 65535
        assert_ramp(decode_image(png(samples), reading=Reading(ground="black")))


def test_a_clear_sample_of_sixteen_bits_is_clear() -> None:
    samples = np.array([[40000, 40001]])
    image = decode_image(png(samples, key=struct.pack(">H", 40001)))
    assert (image.getpixel((0, 0)), image.getpixel((1, 0))) == ((156,) * 3, (255,) * 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_the_ground_that_was_chosen(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (2, 1), 0).save(buffer, "PNG")
    for ground, pixel in (("white", 255), ("black", 0), ("gray", 128), ("#0a0a0a", 10)):
        image = decode_image(buffer.getvalue(), reading=Reading(ground=ground))
        assert image.getpixel((0, 0)) == (pixel,) * 3
    for bad in ("nothing", "#12345", "#00000000"):
        with pytest.raises(SettingsError, match="ground"):
            FitSettings.parse({"ground": bad})


def write(folder: Path, *files: bytes) -> list[Path]:
    paths = [folder / f"{place}.png" for place in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    return paths


def test_the_support_images_decide_for_those_that_do_not_say(tmp_path: Path) -> None:
    twelve = write(tmp_path, png(gray(4095, 0.3)), png(gray(4095, 0.9)))
    reading = find_reading(twelve)
    assert (reading.white_level, round(reading.peak, 2)) == (4095, 0.9)
    for path, share in zip(twelve, (0.3, 0.9), strict=True):
        values = np.asarray(read_image(path, reading), int)
        assert np.abs(values[..., 0] - RAMP * share * 255).max() <= 1
    # What a file says goes before what the others hold, and a setting before a guess.
    assert find_reading(write(tmp_path, png(gray(900), 12), png(gray(900)))).white_level == 4095
    assert find_reading(twelve, white_level=16383).white_level == 16383
    assert find_reading(write(tmp_path, png(gray(0)))).white_level == 65535


def test_an_image_of_another_depth_is_read_alike_or_refused(tmp_path: Path) -> None:
    reading = find_reading(write(tmp_path, png(gray(4095))))
    assert_ramp(decode_image(png(gray(1023), 10), reading=reading))
    assert_ramp(decode_image(png(gray(4095)), reading=reading))
    assert_ramp(decode_image(png(gray(65535), 16), reading=reading))
    with pytest.raises(UnsupportedImageError, match="samples of 65535, above the white level"):
        decode_image(png(gray(65535)), reading=reading)
    with pytest.raises(UnsupportedImageError, match="no sample above 1023, the support images"):
        decode_image(png(gray(1023)), reading=reading)
    # Somewhat darker than the support images, or black, is none of a depth's business.
    decode_image(png(gray(1500)), reading=reading)
    decode_image(png(gray(0)), reading=reading)
    for full in (png(gray(65535)), png(gray(255), 8)):
        sixteen = find_reading(write(tmp_path, full, png(gray(65535))))
        with pytest.raises(UnsupportedImageError, match="no sample above 4095"):
            decode_image(png(gray(4095)), reading=sixteen)
    # Eight bits say how bright the others should be.
    eight = io.BytesIO()
    Image.fromarray((RAMP * 255).astype(np.uint8)).save(eight, "PNG")
    with pytest.raises(UnsupportedImageError, match="no sample above 4095"):
        decode_image(png(gray(4095)), reading=find_reading(write(tmp_path, eight.getvalue())))


def test_a_prompt_set_of_before_reads_as_before() -> None:
    image = decode_image(png(gray(4095)), reading=FORMER)
    assert np.asarray(image).max() == 16


def test_a_prompt_set_keeps_how_its_files_are_read(tmp_path: Path) -> None:
    backbone = FakeBackbone()
    support = write(tmp_path, png(gray(4095)), png(gray(4095, 0.8)))
    settings = FitSettings(steps=1, ground="black", reference_copies=0)
    fitted = fit("nut", support, settings, backbone=backbone)
    kept = PromptSet.from_bytes(fitted.to_bytes())
    assert kept.reading == Reading(white_level=4095, peak=1.0, ground="black")
    assert_ramp(read_image(support[0], kept.reading))
    same = io.BytesIO()
    Image.fromarray(np.rint(RAMP * 255).astype(np.uint8)).save(same, "PNG")
    detector = Detector(backbone, kept)
    scores = [
        inspection.anomaly_score
        for inspection in detector.inspect(
            [
                read_image(support[0], kept.reading),
                decode_image(same.getvalue(), reading=kept.reading),
            ]
        )
    ]
    assert scores[0] == pytest.approx(scores[1], abs=0.02)
    with pytest.raises(DataError, match="above the white level"):
        fit(
            "nut",
            support,
            settings,
            backbone=backbone,
            calibration=write(tmp_path / "..", png(gray(65535)))[:1],
        )
