"""Images in and out: bytes to checked RGB images, masks, overlays.

Legend: H height, W width, in pixels.
"""

import io
import re
import struct
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from scipy import ndimage

from apt_ray import levels
from apt_ray.config import Ground
from apt_ray.errors import (
    DataError,
    ImageError,
    ImageTooLargeError,
    UnsupportedImageError,
)
from apt_ray.files import AnyPath, Location, location, read_file, visible
from apt_ray.levels import UNTOLD, Reading, depth_white

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})

_SIGNATURES = {
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "JPEG": rb"\xff\xd8\xff",
    "BMP": rb"BM",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "WEBP": rb"RIFF....WEBP",
}
# Chunks of a PNG beside the critical ones that say how its pixels are meant.
_KEPT_CHUNKS = frozenset({b"tRNS", b"eXIf"})
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_OTHER_SIGNATURES = (b"GIF8", b"%PDF", b"8BPS", b"<svg", b"<?xml", b"\0\0\0\x0cjP  ")

# Control points of the "plasma" colour map: even in lightness, readable by colour-blind people.
_RAMP = np.array(
    [(13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33)],
    dtype=np.float32,
)
_TINT_OPACITY = 0.6


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """What is accepted before any pixel is decoded; above 178 million pixels nothing is."""

    max_bytes: int = 20 * 2**20
    max_pixels: int = 40_000_000


# A JPEG's black may be as bright as this, of 255.
_FAINT = 32
# Files of our own need no limit on bytes.
_LOCAL_LIMITS = ImageLimits(max_bytes=sys.maxsize)
_open_lock = threading.Lock()


def decode_image(
    data: bytes,
    *,
    limits: ImageLimits = ImageLimits(),
    source: str = "image",
    reading: Reading = UNTOLD,
) -> Image.Image:
    """The first frame of a PNG, JPEG, BMP, TIFF or WebP file as an upright RGB image.

    16-bit samples are scaled to 8 bits, transparency is laid on a ground, EXIF orientation is
    applied. The bytes say what type it is, not its name; metadata that cannot be read counts as
    absent.

    Args:
        limits: of the file.
        source: names the image in messages.
        reading: white level and ground: `PromptSet.reading`, if a prompt set is to inspect it.

    Raises:
        ImageTooLargeError: above the limits.
        UnsupportedImageError: not one of these file types; signed, floating-point or 32-bit
            samples; 16-bit samples of which nobody says which one is white.
        ImageError: damaged or empty.
    """
    image = _open(data, limits, source)
    _check_samples(image.format, data, source)
    try:
        deep = _deep_samples(image, data, limits, source)
        if deep is None:
            return with_ground(_upright(image), reading.ground)
        return with_ground(deep.to_8_bits(deep.white_by(reading, source)), reading.ground)
    except UnsupportedImageError:
        raise
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise ImageError(f"{source} is damaged ({error}): save it again and retry") from error


def read_image(path: AnyPath, reading: Reading = UNTOLD) -> Image.Image:
    """`decode_image` of a file of our own, without the limit on bytes. Raises DataError."""
    try:
        return decode_image(
            read_file(path), limits=_LOCAL_LIMITS, source=str(path), reading=reading
        )
    except ImageError as error:
        raise DataError(str(error)) from error


def find_reading(
    support: Sequence[AnyPath], *, ground: Ground = "white", white_level: int | None = None
) -> Reading:
    """How the files of a category are read, by what its support images say and hold.

    Args:
        support: their files.
        ground: what transparency is laid on.
        white_level: that of 16-bit files that do not say theirs, if it is known.

    Raises:
        DataError: a file cannot be read.
    """
    if white_level is not None:
        return Reading(white_level=white_level, ground=ground)
    peaks: list[tuple[int, int | None]] = []
    for path in support:
        try:
            image = _open(data := read_file(path), _LOCAL_LIMITS, str(path))
            _check_samples(image.format, data, str(path))
            deep = _deep_samples(image, data, _LOCAL_LIMITS, str(path))
            if deep is None:
                shallow = np.asarray(with_ground(image, ground))
                peaks.append((int(shallow.max(initial=0)), 255))
            else:
                peaks.append((deep.highest, deep.white_level))
        except DataError:
            raise
        except ImageError as error:
            raise DataError(str(error)) from error
        except Exception as error:  # Pillow raises nearly anything on damaged files
            raise DataError(f"{path} is damaged ({error}): save it again and retry") from error
    told = [white for _, white in peaks if white not in (None, 255)]
    untold = [highest for highest, white in peaks if white is None]
    # What a file says holds for the others; else the least depth that holds them all.
    found = max(told) if told else depth_white(max(untold, default=0))
    peak = max((highest / (white or found) for highest, white in peaks), default=0.0)
    return Reading(white_level=found, peak=min(peak, 1.0), ground=ground)


def is_image_file(path: Location) -> bool:
    """Whether it is a file whose name ends like that of an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def read_mask(path: AnyPath, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Ground-truth mask (H, W) of a defect: True where the file is neither clear nor black.

    Black on a clear ground counts if nothing else is painted there. A folder holds masks that are
    laid over one another. Raises DataError if a file cannot be read
    or is not of `size` = (width, height), or if nothing is painted.
    """
    path = location(path)
    mask_HW = np.zeros((size[1], size[0]), np.bool_)
    files = filter(is_image_file, visible(path)) if path.is_dir() else [path]
    for file in files:
        mask_HW |= _read_layer(file, size)
    if not mask_HW.any():
        raise DataError(
            f"nothing is painted in the mask {path}, though its image is defective: paint the"
            f" defect white on black, or take image and mask away"
        )
    return mask_HW


def read_region(path: AnyPath) -> NDArray[np.bool_]:
    """Region of interest (H, W): True where the file is neither clear nor black, by any value.

    If it is black alone on a clear ground, the ground counts. Raises DataError if the file cannot
    be read or nothing is left to count.
    """
    ink_HW, is_clear_HW = _read_paint(path)
    region_HW = ink_HW if ink_HW.any() or is_clear_HW.all() else is_clear_HW
    if not region_HW.any():
        raise DataError(
            f"the region of interest {path} leaves nothing of an image to count: paint white what"
            f" counts, on black"
        )
    return region_HW


def cover(mask_HW: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask stretched to `size` = (rows, columns): True where any of it falls, even in part."""
    for axis, cells in enumerate(size):
        length = mask_HW.shape[axis]
        edges = np.arange(cells + 1) * length
        # Of each cell, the first pixel that it touches and the first one behind it.
        spans = np.stack([edges[:-1] // cells, -(-edges[1:] // cells)], axis=-1)
        # Every other result is of what lies between two cells; the last cell ends at the padding.
        padded_HW = np.pad(mask_HW, [(0, int(axis == each)) for each in range(2)])
        mask_HW = np.logical_or.reduceat(padded_HW, spans.ravel(), axis).take(
            np.arange(0, 2 * cells, 2), axis
        )
    return mask_HW


def _paint(image: Image.Image, data: bytes) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where a mask is neither clear nor black, by any value, and where it is clear, both (H, W).

    In JPEG and WebP, which may lose what is faint, it takes more than half of the brightest pixel,
    and that of a mask is above 32.
    """
    deep = _deep_samples(image, data, _LOCAL_LIMITS, "mask")
    if deep is not None:
        values_HWC, alpha_HW = deep.colour_HWC, deep.alpha_HW
        if deep.is_inverted:
            values_HWC = (deep.white_level or depth_white(deep.highest)) - values_HWC
        is_clear_HW = (
            np.zeros(values_HWC.shape[:2], np.bool_) if alpha_HW is None else alpha_HW == 0
        )
        return (values_HWC > 0).any(axis=-1) & ~is_clear_HW, is_clear_HW
    is_lossy = image.format in ("JPEG", "WEBP")
    image = _upright(image)
    is_clear_HW = np.zeros((image.height, image.width), np.bool_)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        is_clear_HW = np.asarray(image.getchannel("A")) == 0
        image = image.convert("RGB")
    elif image.mode not in ("1", "L", "I", "F", "RGB"):
        image = image.convert("RGB")
    values_HWC = np.atleast_3d(np.asarray(image))
    brightest = int(values_HWC.max()) if is_lossy else 0
    floor = max(brightest / 2, _FAINT) if is_lossy else 0
    return (values_HWC > floor).any(axis=-1) & ~is_clear_HW, is_clear_HW


def _read_paint(path: AnyPath) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    try:
        data = read_file(path)
        return _paint(_open(data, _LOCAL_LIMITS, str(path)), data)
    except ImageError as error:
        raise DataError(str(error)) from error
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path} is damaged ({error}): save it again") from error


def _read_layer(path: Location, size: tuple[int, int]) -> NDArray[np.bool_]:
    ink_HW, is_clear_HW = _read_paint(path)
    height, width = ink_HW.shape
    if (width, height) != size:
        raise DataError(
            f"mask {path} is {width} x {height} pixels but its image is "
            f"{size[0]} x {size[1]}: save the mask in the size of the image"
        )
    return ~is_clear_HW if is_clear_HW.any() and not ink_HW.any() else ink_HW


def draw_overlay(
    image: Image.Image, anomaly_map_HW: NDArray[np.float32], *, threshold: float
) -> Image.Image:
    """The image with its anomaly map tinted over it and the area above `threshold` outlined.

    The tint is clear at 0, half way up its colours at the threshold, strongest from twice
    the threshold on. `anomaly_map_HW` has the size of the image; ValueError otherwise.
    """
    if anomaly_map_HW.shape != (image.height, image.width):
        raise ValueError(
            f"the map is {anomaly_map_HW.shape}, the image {(image.height, image.width)} (H, W)"
        )
    steps = np.linspace(0, 1, 256)
    opacity = (_TINT_OPACITY * steps**1.5).astype(np.float32)[:, None]
    stops = np.linspace(0, 1, len(_RAMP))
    colours = np.stack([np.interp(steps, stops, channel) for channel in _RAMP.T], axis=-1)
    tint = (colours * opacity).astype(np.float32)

    scale = 255 / max(2 * threshold, 1e-6)
    level_HW = np.clip(anomaly_map_HW * scale, 0, 255).astype(np.uint8)
    pixels_HW3 = np.asarray(image.convert("RGB"), dtype=np.float32)
    pixels_HW3 = pixels_HW3 * (1 - opacity)[level_HW] + tint[level_HW]

    # White within black shows on every ground; it runs outside, so it never hides a small region.
    above_HW = anomaly_map_HW > threshold
    width = max(1, round(min(image.size) / 300))
    for value, distance in ((0, 2 * width), (255, width)):
        pixels_HW3[_dilate(above_HW, distance) & ~above_HW] = value
    return Image.fromarray(np.rint(pixels_HW3).astype(np.uint8))


def encode_png(image: Image.Image) -> bytes:
    """The image as a PNG file; fast rather than small."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def encode_jpeg(image: Image.Image, *, side: int, quality: int = 85) -> bytes:
    """The image as a JPEG file whose longer side is at most `side` pixels."""
    small = image.copy()
    small.thumbnail((side, side), reducing_gap=2.0)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def _open(data: bytes, limits: ImageLimits, source: str) -> Image.Image:
    """Parses the header and holds it against the limits; decodes no pixel."""
    if len(data) > limits.max_bytes:
        raise ImageTooLargeError(
            f"{source} has {len(data):,} bytes, more than the {limits.max_bytes:,} accepted: "
            "send a smaller or more compressed image"
        )
    file_format = next(
        (name for name, start in _SIGNATURES.items() if re.match(start, data, re.DOTALL)), None
    )
    if file_format is None:
        if data.startswith(_OTHER_SIGNATURES) or data[4:8] == b"ftyp":  # HEIC, AVIF, films
            raise UnsupportedImageError(
                f"{source} is not a PNG, JPEG, BMP, TIFF or WebP file: convert it to one of these"
            )
        raise ImageError(f"{source} is not an image file: send a PNG, JPEG, BMP, TIFF or WebP file")
    try:
        # Pillow's own warning about large images would come before our limit is checked; the
        # lock is there because warning filters belong to the process.
        with _open_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            file = io.BytesIO(_without_metadata(data) if file_format == "PNG" else data)
            image = Image.open(file, formats=[file_format])
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(
            f"{source} has far more pixels than can be accepted: send a smaller image"
        ) from error
    except UnidentifiedImageError as error:  # its own words name an object in memory
        _check_samples(file_format, data, source)
        if file_format == "TIFF" and (bits := levels.bits_of_samples(data)) not in (1, 2, 4, 8, 16):
            raise UnsupportedImageError(
                f"{source} has samples of {bits} bits in an order that is not read: save it with 8"
                f" or 16 bits"
            ) from error
        raise ImageError(
            f"{source} is damaged (it begins like {file_format}): save it again and retry"
        ) from error
    except Exception as error:
        raise ImageError(f"{source} is damaged ({error}): save it again and retry") from error
    # Pillow looks there for an orientation, too, and fails where a TIFF holds it as a text.
    image.info.pop("xmp", None)
    if image.width * image.height > limits.max_pixels:
        raise ImageTooLargeError(
            f"{source} has {image.width} x {image.height} pixels, more than the "
            f"{limits.max_pixels:,} accepted: send a smaller image"
        )
    return image


def _check_samples(file_format: str | None, data: bytes, source: str) -> None:
    kind = levels.kind_of_samples(data) if file_format == "TIFF" else None
    if kind is not None:
        raise UnsupportedImageError(f"{source} has {kind}: save it with 8 or 16 unsigned bits")


def _deep_samples(
    image: Image.Image, data: bytes, limits: ImageLimits, source: str
) -> levels.Samples | None:
    """The samples of an opened file of more than 8 bits, upright; None if it has no more."""
    if not levels.is_deep(image):
        return None
    low = image
    if not image.mode.startswith("I"):
        low = _upright(levels.lower_bytes(_open(data, limits, source)))
    return levels.samples(_upright(image), low, data)


def _without_metadata(data: bytes) -> bytes:
    """A PNG file without the chunks that its pixels do not need, sound or not: texts, a colour
    profile. Pillow would decompress them, and refuse the image for what is wrong with them."""
    kept, place = [data[:8]], 8
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        is_critical = not kind[0] & 0x20  # a capital letter
        if is_critical or kind in _KEPT_CHUNKS or end > len(data):
            kept.append(data[place:end])
        place = end
    kept.append(data[place:])
    return b"".join(kept)


def _upright(image: Image.Image) -> Image.Image:
    """The image, decoded, as its EXIF orientation says that it is to be seen."""
    image.load()  # outside of the following: damaged pixels are an error
    try:
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises nearly anything on damaged EXIF
        turn = None
    return image if turn is None else image.transpose(turn)


def with_ground(image: Image.Image, ground: Ground) -> Image.Image:
    """An image as RGB; what of it is transparent shows the ground."""
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, ground)
        return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _dilate(mask_HW: NDArray[np.bool_], distance: int) -> NDArray[np.bool_]:
    cross = ndimage.generate_binary_structure(2, 1)
    return np.asarray(ndimage.binary_dilation(mask_HW, structure=cross, iterations=distance))
