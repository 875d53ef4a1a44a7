"""Normal images that the fleet is given to learn from, in a folder that searches read.

    <folder>/<category>/good/<digest>.<suffix>

Files are kept as they came and named by their pixels, so that one that is sent twice is there once.
"""

import io
from pathlib import Path

from PIL import Image
from pydantic import BaseModel, Field

from apt_ray.data.distinct import pixel_digest
from apt_ray.errors import ImageError
from apt_ray.files import write_whole
from apt_ray.images import ImageLimits, decode_image, encode_jpeg

_GOOD = "good"
_NAME_LENGTH = 16
_SUFFIXES = {"PNG": "png", "JPEG": "jpg", "BMP": "bmp", "TIFF": "tif", "WEBP": "webp"}
_SMALL = 320
"""Pixels of the longer side of what is shown of an image."""


class TrainingImage(BaseModel):
    """A normal image to learn from."""

    name: str
    width: int
    height: int


class AddedImages(BaseModel):
    """What has become of images that were sent."""

    images: list[TrainingImage] = Field(description="All that are there now, oldest first.")
    copies: int = Field(description="How many were there already, by their pixels.")


class FullError(Exception):
    """No more images of a category are taken."""


class TrainingImages:
    """The images of all categories.

    Args:
        folder: where they lie.
        limits: of an image.
        most: images of a category.
    """

    def __init__(self, folder: Path, *, limits: ImageLimits, most: int) -> None:
        self.folder, self._limits, self._most = folder, limits, most

    def of(self, category: str) -> list[TrainingImage]:
        """All of a category, oldest first."""
        home = self.folder / category / _GOOD
        files = home.iterdir() if home.is_dir() else ()
        found = sorted(
            (file for file in files if file.suffix[1:] in _SUFFIXES.values()),
            key=lambda file: (file.stat().st_mtime_ns, file.name),
        )
        shown = []
        for file in found:
            with Image.open(file) as image:
                shown.append(TrainingImage(name=file.name, width=image.width, height=image.height))
        return shown

    def add(self, category: str, files: list[bytes]) -> AddedImages:
        """Keep image files.

        Raises:
            ImageError: one is no acceptable image; none is kept.
            FullError: the category has as many as it may.
            WriteError: the disk does not take them.
        """
        named = [self._named(data) for data in files]
        there = {Path(image.name).stem for image in self.of(category)}
        new = {name: data for name, data in named if Path(name).stem not in there}
        if len(there) + len(new) > self._most:
            raise FullError(f"{category} has {len(there)} images, and may have {self._most}")
        for name, data in new.items():
            place = self.folder / category / _GOOD / name
            place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(place, data)
        return AddedImages(images=self.of(category), copies=len(files) - len(new))

    def remove(self, category: str, name: str) -> None:
        """Strike an image out; FileNotFoundError if there is none of that name."""
        self._place(category, name).unlink()

    def small(self, category: str, name: str) -> bytes:
        """A small JPEG of an image; FileNotFoundError if there is none of that name."""
        data = self._place(category, name).read_bytes()
        return encode_jpeg(decode_image(data, limits=self._limits), side=_SMALL)

    def _place(self, category: str, name: str) -> Path:
        if name not in {image.name for image in self.of(category)}:
            raise FileNotFoundError(name)
        return self.folder / category / _GOOD / name

    def _named(self, data: bytes) -> tuple[str, bytes]:
        digest = pixel_digest(decode_image(data, limits=self._limits))
        with Image.open(io.BytesIO(data)) as image:
            suffix = _SUFFIXES.get(image.format or "")
        if suffix is None:
            raise ImageError(f"files of {image.format} are not kept: save it as PNG")
        return f"{digest[:_NAME_LENGTH]}.{suffix}", data
