"""Categories of images in folders, local ones or in S3.

Three layouts, told apart by what a category's folder holds:

    MVTec AD                                plain
    <category>/train/good/*.png             <category>/good/*.png
    <category>/test/good/*.png              <category>/<defect type>/*.png
    <category>/test/<defect type>/*.png     <category>/ground_truth/<defect type>/<stem>_mask.png
    <category>/ground_truth/<defect type>/<stem>_mask.png

or, plainer still, images directly in <category>/, which are all good; and that of VisA, as it is
published, whose normal images and splits are listed in split_csv/1cls.csv of the root:

    <category>/Data/Images/Normal/*.JPG
    <category>/Data/Images/Anomaly/*.JPG
    <category>/Data/Masks/Anomaly/<stem>.png

Test images and ground-truth masks may be absent. In the plain layout, and in that of VisA without
the list, the normal images outside the support set are the good test images.
"""

import csv
import hashlib
import io
import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from apt_ray.config import CATEGORY_NAME
from apt_ray.errors import DataError
from apt_ray.files import Location, S3Path, absolute, file_sha256, read_file
from apt_ray.images import IMAGE_SUFFIXES

GOOD = "good"
_GROUND_TRUTH = "ground_truth"
_VISA_NORMAL, _VISA_ANOMALY = "Data/Images/Normal", "Data/Images/Anomaly"
_VISA_MASKS = "Data/Masks/Anomaly"
_VISA_SPLITS = "split_csv"
_NAME = re.compile(CATEGORY_NAME)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledImage:
    """A test image: its defect type ("good" if normal) and, where known, its mask's file."""

    path: Location
    defect_type: str
    mask: Location | None = None

    @property
    def is_anomalous(self) -> bool:
        return self.defect_type != GOOD


@dataclass(frozen=True, kw_only=True, slots=True)
class Category:
    """The images of one product class; all paths are absolute and sorted by name."""

    name: str
    root: Location
    good: tuple[Location, ...]
    test: tuple[LabelledImage, ...]

    @property
    def has_masks(self) -> bool:
        """Whether there is an anomalous test image and every one of them has a mask."""
        anomalous = [image for image in self.test if image.is_anomalous]
        return bool(anomalous) and all(image.mask is not None for image in anomalous)

    def support_set(self, shots: int, seed: int) -> tuple[Location, ...]:
        """`shots` normal images drawn by `seed`; fewer shots draw a part of what more would."""
        if not 1 <= shots <= len(self.good):
            raise DataError(
                f"category {self.name} has {len(self.good)} normal images in {self.root}, "
                f"{shots} shots were asked for: add normal images or ask for fewer shots"
            )
        return tuple(random.Random(seed).sample(self.good, len(self.good))[:shots])

    def calibration_set(self, count: int, *, shots: int, seed: int) -> tuple[Location, ...]:
        """`count` further normal images: those drawn next after the support set."""
        left = len(self.good) - len(self.support_set(shots, seed))
        if not 0 <= count <= left:
            raise DataError(
                f"category {self.name} has {left} normal images in {self.root} beside the {shots}"
                f" of the support set, {count} were asked for to calibrate: add normal images, or"
                f" ask for fewer"
            )
        return self.support_set(shots + count, seed)[shots:]

    def held_out(self, support: Collection[Location]) -> tuple[LabelledImage, ...]:
        """The test images that are not in the support set."""
        return tuple(image for image in self.test if image.path not in support)

    def name_of(self, path: Location) -> str:
        """Where an image lies below the category's folder: the same on disk and in S3."""
        return "/".join(path.parts[len(self.root.parts) :])


def find_categories(root: Location, names: Sequence[str] = ()) -> list[Category]:
    """The categories in `root`, or `root` itself if it is one, sorted by name.

    With `names` only these are looked at. Raises DataError for whatever would make a category
    unusable, with the path and the remedy.
    """
    root = absolute(root)
    if not root.is_dir():
        remedy = (
            "check bucket and prefix"
            if isinstance(root, S3Path)
            else "give an absolute path that exists on every node that reads it"
        )
        raise DataError(f"{root} is not a folder: {remedy}")
    folders = {folder.name: folder for folder in ([root] if _is_category(root) else _folders(root))}
    if not folders:
        raise DataError(
            f"{root} holds no category: give each product a folder with its normal images "
            f"in {root / '<category>' / GOOD}"
        )
    unknown = sorted(set(names) - set(folders))
    if unknown:
        raise DataError(f"{root} has no category {', '.join(unknown)}; it has {', '.join(folders)}")
    return [
        _read_category(folder) for name, folder in folders.items() if name in (names or folders)
    ]


def support_hash(paths: Sequence[Location]) -> str:
    """SHA-256 over the digests of the files' bytes, whatever their names and order."""
    digests = [bytes.fromhex(file_sha256(path)) for path in paths]
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _is_category(folder: Location) -> bool:
    if any((folder / sign).is_dir() for sign in ("train", GOOD, _VISA_NORMAL)):
        return True
    return bool(_images(folder)) and not _folders(folder)


def _read_category(folder: Location) -> Category:
    if not _NAME.fullmatch(folder.name):
        raise DataError(
            f"{folder.name!r} cannot name a category: rename the folder {folder} "
            "so that it has only letters, digits, '-' and '_'"
        )
    if (folder / "train").is_dir():
        home = folder / "train" / GOOD
        good = _images(home)
        test = _labelled_folders(folder, _folders(folder / "test"))
    elif (folder / GOOD).is_dir():
        home = folder / GOOD
        good = _images(home)
        test = _labelled_folders(folder, _folders(folder))
    elif (folder / _VISA_NORMAL).is_dir():
        home = folder / _VISA_NORMAL
        good, test = _read_visa(folder)
    elif _folders(folder):
        raise DataError(
            f"category {folder} has folders but none with normal images: move these to "
            f"{folder / GOOD}, or name the categories to use"
        )
    else:
        home = folder
        good = _images(home)
        test = tuple(LabelledImage(path=path, defect_type=GOOD) for path in good)
    if not good:
        raise DataError(
            f"category {folder.name} has no normal image: put PNG, JPEG, BMP, TIFF or WebP files "
            f"into {home}, or remove the folder {folder}"
        )
    return Category(name=folder.name, root=folder, good=good, test=test)


def _read_visa(folder: Location) -> tuple[tuple[Location, ...], tuple[LabelledImage, ...]]:
    """Normal images and test images; the published split of one class sets good ones aside."""
    normal, anomalous = _images(folder / _VISA_NORMAL), folder / _VISA_ANOMALY
    list_file = folder.parent / _VISA_SPLITS / "1cls.csv"
    good = tested = normal
    if list_file.is_file():
        rows = csv.DictReader(io.StringIO(read_file(list_file).decode("utf-8-sig")))
        split = {row["image"]: row["split"] for row in rows if row["object"] == folder.name}
        good, tested = (
            tuple(p for p in normal if split.get(f"{folder.name}/{_VISA_NORMAL}/{p.name}") == part)
            for part in ("train", "test")
        )
    test = [
        *_labelled(_images(anomalous), "anomaly", folder / _VISA_MASKS),
        *_labelled(tested, GOOD, None),
    ]
    return good, tuple(test)


def _labelled_folders(category: Location, types: Sequence[Location]) -> tuple[LabelledImage, ...]:
    return tuple(
        image
        for folder in types
        if folder.name != _GROUND_TRUTH
        for image in _labelled(_images(folder), folder.name, category / _GROUND_TRUTH / folder.name)
    )


def _labelled(
    images: Sequence[Location], defect_type: str, masks: Location | None
) -> list[LabelledImage]:
    """MVTec AD names masks <stem>_mask.png, others <stem>.png."""
    named = {path.name: path for path in _images(masks)} if masks is not None else {}
    return [
        LabelledImage(
            path=path,
            defect_type=defect_type,
            mask=named.get(f"{path.stem}_mask.png") or named.get(f"{path.stem}.png"),
        )
        for path in images
    ]


def _images(folder: Location) -> tuple[Location, ...]:
    return tuple(
        path
        for path in _visible(folder)
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )


def _folders(folder: Location) -> tuple[Location, ...]:
    return tuple(path for path in _visible(folder) if path.name != _VISA_SPLITS and path.is_dir())


def _visible(folder: Location) -> list[Location]:
    """What is in the folder, sorted, without hidden files; nothing if there is no such folder."""
    if not folder.is_dir():
        return []
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}") from error
