"""Images in and out: bytes to checked RGB images, masks, overlays.

Legend: H height, W width, in pixels.
"""

import io
import re
import struct
import sys
import threading
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from scipy import ndimage

from apt_ray.errors import (
    DataError,
    ImageError,
    ImageTooLargeError,
    UnsupportedImageError,
)
from apt_ray.files import AnyPath, Location, location, read_file, visible

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
    data: bytes, *, limits: ImageLimits = ImageLimits(), source: str = "image"
) -> Image.Image:
    """The first frame of a PNG, JPEG, BMP, TIFF or WebP file as an upright RGB image.

    16-bit gray is scaled to 8 bits, transparency is laid on white, EXIF orientation is applied. The
    bytes say what type it is, not its name; metadata that cannot be read counts as absent.
    `source` names the image in messages. Raises ImageTooLargeError, UnsupportedImageError (not
    one of these file types, or 32-bit pixels) or ImageError (damaged or empty).
    """
    image = _open(data, limits, source)
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise UnsupportedImageError(f"{source} has 32-bit pixels: save it with 8 or 16 bits")
    try:
        return _to_rgb(_upright(image))
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise ImageError(f"{source} is damaged ({error}): save it again and retry") from error


def read_image(path: AnyPath) -> Image.Image:
    """`decode_image` of a file of our own, without the limit on bytes. Raises DataError."""
    try:
        return decode_image(read_file(path), limits=_LOCAL_LIMITS, source=str(path))
    except ImageError as error:
        raise DataError(str(error)) from error


def is_image_file(path: Location) -> bool:
    """Whether it is a file whose name ends like that of an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def read_mask(path: AnyPath, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Ground-truth mask (H, W) of a defect: True where the file is painted (`painted`).

    A folder holds masks that are laid over one another. Raises DataError if a file cannot be read
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


def painted(image: Image.Image) -> NDArray[np.bool_]:
    """Where a mask is painted, (H, W): wherever it is neither clear nor black, by any value.

    Two files differ. With transparency, black counts if nothing else is painted on the clear
    ground. In JPEG and WebP, which may lose what is faint, it takes more than half of the brightest
    pixel, and that of a mask is above 32.
    """
    is_lossy = image.format in ("JPEG", "WEBP")
    is_clear_HW = np.zeros((image.height, image.width), np.bool_)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        is_clear_HW = np.asarray(image.getchannel("A")) == 0
        image = image.convert("RGB")
    elif image.mode not in ("1", "L", "I", "F", "RGB") and not image.mode.startswith("I;16"):
        image = image.convert("RGB")
    values_HWC = np.atleast_3d(np.asarray(image))
    brightest = int(values_HWC.max()) if is_lossy else 0
    floor = max(brightest / 2, _FAINT) if is_lossy else 0
    ink_HW = (values_HWC > floor).any(axis=-1) & ~is_clear_HW
    if is_clear_HW.any() and not ink_HW.any():
        return ~is_clear_HW
    return np.asarray(ink_HW)


def _read_layer(path: Location, size: tuple[int, int]) -> NDArray[np.bool_]:
    try:
        image = _open(read_file(path), _LOCAL_LIMITS, str(path))
        painted_HW = painted(image)
    except ImageError as error:
        raise DataError(str(error)) from error
    except Exception as error:
        raise DataError(f"{path} is damaged ({error}): save it again") from error
    if image.size != size:
        raise DataError(
            f"mask {path} is {image.width} x {image.height} pixels but its image is "
            f"{size[0]} x {size[1]}: save the mask in the size of the image"
        )
    return painted_HW


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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray; Pillow's own conversion would clip at 255
        gray_HW = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((gray_HW + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _dilate(mask_HW: NDArray[np.bool_], distance: int) -> NDArray[np.bool_]:
    cross = ndimage.generate_binary_structure(2, 1)
    return np.asarray(ndimage.binary_dilation(mask_HW, structure=cross, iterations=distance))
