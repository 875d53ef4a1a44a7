"""What the samples of an image file mean: which one is white, and which files do not say.

Cameras of 10 and 12 bits write files of 16, whose white is 1023 or 4095 and not 65535. Files of 8
bits have no such question.

Legend: H height, W width, C channels.
"""

import struct
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from pydantic import Field

from apt_ray.config import Ground, Settings
from apt_ray.errors import UnsupportedImageError

FULL = 65535
"""White of 16 bits."""

_DEPTHS = (8, 10, 12, 14, 16)  # of cameras
_BITS_PER_SAMPLE, _PHOTOMETRIC, _MAX_SAMPLE_VALUE, _SAMPLE_FORMAT = 258, 262, 281, 339
_WHITE_LEVEL = 50717  # of DNG
_KINDS = {2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}
# Samples this much below the white level may be of a file of two bits less, ...
_FEWER_BITS = 4
# ... unless the support images are about as dark.
_DARKER = 3


class Reading(Settings):
    """How image files become RGB images: equal for all images of a category.

    It matters to files of more than 8 bits and to files with transparency alone.
    """

    white_level: int | None = Field(
        default=None,
        ge=1,
        le=FULL,
        description="The white of 16-bit files that do not say theirs; None: nobody knows.",
    )
    peak: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="The brightest sample of the support images, white being 1; 0: not known.",
    )
    ground: Ground = Field(default="white", description="What transparency is laid on.")


UNTOLD = Reading()
"""That of a file of which nobody says more than it does itself."""

FORMER = Reading(white_level=FULL)
"""That of prompt sets which do not say."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Samples:
    """The samples of a file of more than 8 bits.

    Attributes:
        colour_HWC: uint16, C is 1 or 3.
        alpha_HW: uint16, None without transparency.
        white_level: what the file says, None if it does not.
        is_inverted: whether 0 is white.
    """

    colour_HWC: NDArray[np.uint16]
    alpha_HW: NDArray[np.uint16] | None
    white_level: int | None
    is_inverted: bool

    @property
    def highest(self) -> int:
        return int(self.colour_HWC.max(initial=0))

    def white_by(self, reading: Reading, source: str) -> int:
        """The white level; UnsupportedImageError if that would be a guess."""
        if self.white_level is not None:
            return self.white_level
        white, highest = reading.white_level or FULL, self.highest
        said = (
            "let the file say its white (sBIT in PNG, MaxSampleValue in TIFF), save it with 8 bits,"
            " or"
        )
        if highest > white:
            raise UnsupportedImageError(
                f"{source} has samples of {highest}, above the white level of its category,"
                f" {white}: {said} fit with a higher --white-level"
            )
        is_dark = 0 < highest * _FEWER_BITS <= white
        if is_dark and reading.white_level is None:
            raise UnsupportedImageError(
                f"{source} has 16 bits, but no sample above {highest}, and does not say which is"
                f" white: {said} read it with the reading of a prompt set"
            )
        if is_dark and highest * _DARKER < reading.peak * white:
            raise UnsupportedImageError(
                f"{source} has no sample above {highest}, the support images have"
                f" {round(reading.peak * white)} where white is {white}: it is nearly dark, or of"
                f" another depth; {said} fit with --white-level"
            )
        return white

    def to_8_bits(self, white: int) -> Image.Image:
        """L, RGB, LA or RGBA; what is above `white` is white."""
        value = np.minimum(np.arange(FULL + 1), white)
        table = ((value * 255 + white // 2) // white).astype(np.uint8)
        colour_HWC = (255 - table if self.is_inverted else table)[self.colour_HWC]
        if self.alpha_HW is None:
            return Image.fromarray(
                colour_HWC.squeeze(-1) if colour_HWC.shape[-1] == 1 else colour_HWC
            )
        rgb_HW3 = np.broadcast_to(colour_HWC, (*colour_HWC.shape[:2], 3))
        opaque = white if self.alpha_HW.max(initial=0) <= white else FULL
        alpha_HW = (self.alpha_HW.astype(np.uint32) * 255 + opaque // 2) // opaque
        return Image.fromarray(np.dstack([rgb_HW3, alpha_HW.astype(np.uint8)]))


def depth_white(highest: int) -> int:
    """The white of the least depth of a camera that holds a sample; 65535 where all is black."""
    return next((2**bits - 1 for bits in _DEPTHS if 0 < highest < 2**bits), FULL)


def is_deep(image: Image.Image) -> bool:
    """Whether an opened file has unsigned samples of 9 to 16 bits that can be read."""
    return (
        image.mode.startswith("I;16")
        or (image.format == "PNG" and image.mode == "I")
        or _low_mode(image) is not None
    )


def samples(high: Image.Image, low: Image.Image, data: bytes) -> Samples:
    """The samples of a file that `is_deep`.

    Args:
        high: the file as it is opened, turned upright.
        low: the same opened by `lower_bytes`, if its samples have colour or transparency.
        data: the file.
    """
    alpha_HW: NDArray[np.uint16] | None = None
    if high.mode.startswith("I"):
        colour_HWC = np.asarray(high).astype(np.uint16)[..., None]
    elif high.info.get("is_gray_with_alpha"):
        bytes_HW4 = np.asarray(low).astype(np.uint16)
        both_HW2 = (bytes_HW4[..., ::2] * np.uint16(256)) | bytes_HW4[..., 1::2]
        colour_HWC, alpha_HW = both_HW2[..., :1], both_HW2[..., 1]
    else:
        all_HWC = np.asarray(high).astype(np.uint16) * np.uint16(256) | np.asarray(low)
        colour_HWC = all_HWC[..., :3]
        alpha_HW = all_HWC[..., 3] if all_HWC.shape[-1] == 4 else None
    key = high.info.get("transparency")
    if alpha_HW is None and isinstance(key, int | tuple):
        is_clear_HW = (colour_HWC == np.atleast_1d(key)).all(axis=-1)
        alpha_HW = np.where(is_clear_HW, 0, FULL).astype(np.uint16)
    tags = _tags(data) if data[:2] in (b"II", b"MM") else {}
    white = _white_in(data, tags, int(colour_HWC.max(initial=0)))
    return Samples(
        colour_HWC=colour_HWC,
        alpha_HW=alpha_HW,
        white_level=white,
        is_inverted=tags.get(_PHOTOMETRIC) == (0,),
    )


def lower_bytes(image: Image.Image) -> Image.Image:
    """An opened file whose samples of 16 bits Pillow would cut to their upper bytes, so changed
    that the lower ones are read; gray with alpha as all four bytes."""
    mode = _low_mode(image)
    image.tile = [  # type: ignore[attr-defined]
        tile._replace(args=mode if isinstance(tile.args, str) else (mode, *tile.args[1:]))
        for tile in image.tile  # type: ignore[attr-defined]
    ]
    return image


def kind_of_samples(data: bytes) -> str | None:
    """What a TIFF has in place of unsigned samples of up to 16 bits, in words; else None."""
    tags = _tags(data)
    kind = next((_KINDS[one] for one in tags.get(_SAMPLE_FORMAT, ()) if one in _KINDS), None)
    bits = max(tags.get(_BITS_PER_SAMPLE, (1,)))
    if kind is None and bits <= 16:
        return None
    return f"{kind or 'unsigned'} samples of {bits} bits"


def bits_of_samples(data: bytes) -> int:
    """Of a TIFF."""
    return max(_tags(data).get(_BITS_PER_SAMPLE, (1,)))


def _low_mode(image: Image.Image) -> str | None:
    """By which raw mode the lower bytes are read, for 16-bit colour and transparency."""
    if image.format not in ("PNG", "TIFF") or not image.tile or len(image.tile) == 0:  # type: ignore[attr-defined]
        return None
    modes = {
        tile.args if isinstance(tile.args, str) else (tile.args or ("",))[0]
        for tile in image.tile  # type: ignore[attr-defined]
    }
    raw = modes.pop() if len(modes) == 1 else None
    if raw == "LA;16B":
        image.info["is_gray_with_alpha"] = True
        return "RGBA"
    name, _, end = str(raw).partition(";16")
    if name not in ("RGB", "RGBA") or end not in ("L", "B", "N"):
        return None
    return f"{name};16{'L' if end == 'B' else 'B'}"


def _white_in(data: bytes, tags: dict[int, tuple[int, ...]], highest: int) -> int | None:
    """What a file says is white."""
    if not tags:
        bits = max(_significant_bits(data), default=0)
        if not 1 <= bits <= 16:
            return None
        # As the format wants it, samples fill all 16 bits whatever was significant.
        white = int(2**bits - 1)
        return white if highest <= white else FULL
    if white := max(tags.get(_WHITE_LEVEL, (0,))):
        return int(min(white, FULL))
    if (bits := max(tags.get(_BITS_PER_SAMPLE, (16,)))) < 16:
        return int(2**bits - 1)
    most = max(tags.get(_MAX_SAMPLE_VALUE, (0,)))
    # By the standard it is a statistic; of a full depth it is a statement.
    is_depth = most > 0 and most & (most + 1) == 0
    return most if is_depth and highest <= most <= FULL else None


def _significant_bits(data: bytes) -> bytes:
    """Of the colour channels of a PNG, one byte each; none if it does not say."""
    place, colours = 8, 1
    while place + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        content = data[place + 8 : place + 8 + length]
        if kind == b"IHDR" and len(content) > 9:
            colours = 3 if content[9] & 2 else 1
        elif kind == b"sBIT":
            return content[:colours]
        elif kind in (b"IDAT", b"IEND"):
            break
        place += 12 + length
    return b""


def _tags(data: bytes) -> dict[int, tuple[int, ...]]:
    """The tags of a TIFF's first directory that speak of samples; none of a damaged one."""
    try:
        is_big = data[2:4] in (b"+\0", b"\0+")
        directory = ImageFileDirectory_v2(data[: 16 if is_big else 8])
        file = BytesIO(data)
        file.seek(directory.next)
        directory.load(file)
        found = {}
        for tag in (
            _BITS_PER_SAMPLE,
            _PHOTOMETRIC,
            _MAX_SAMPLE_VALUE,
            _SAMPLE_FORMAT,
            _WHITE_LEVEL,
        ):
            if tag in directory:
                value = directory[tag]
                values = value if isinstance(value, tuple) else (value,)
                found[tag] = tuple(int(one) for one in values)
        return found
    except Exception:  # Pillow raises nearly anything on damaged files
        return {}
