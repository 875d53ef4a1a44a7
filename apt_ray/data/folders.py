"""Categories of images in folders, local ones or in S3; docs/data.md describes what is read."""

import codecs
import csv
import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PureWindowsPath

from apt_ray.config import CATEGORY_NAME
from apt_ray.data.distinct import Copies, Distinct, pixel_digest
from apt_ray.errors import DataError
from apt_ray.files import (
    AnyPath,
    Location,
    S3Path,
    absolute,
    file_sha256,
    read_file,
    visible,
)
from apt_ray.images import IMAGE_SUFFIXES, find_reading, is_image_file, read_image
from apt_ray.text import printable

GOOD = "good"
LONGEST_KIND = 64
"""Characters of the name of a kind of defect."""

_NORMAL = frozenset({GOOD, "ok", "normal"})
_MASKS = frozenset({"ground_truth", "groundtruth", "masks", "mask", "gt"})
_MARK = re.compile(r"[ ._-]+(masks?|gt|ground[ _-]?truth|label)$", re.IGNORECASE)
_NAME = re.compile(CATEGORY_NAME)
_IMAGES = "PNG, JPEG, BMP, TIFF or WebP files"
_EXPECTED = (
    "give a folder that holds one of images for each kind of defect, or that of one product with"
    " test images"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Folders of a category, in small letters; of several names one may be there.

    Attributes:
        home: holds all others.
        learn: holds the folder of normal images to learn from.
        test: holds a folder for each kind of test image; that of the masks lies in it or beside it.
    """

    name: str
    home: tuple[str, ...] = ()
    learn: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


_LAYOUTS = (
    _Layout(name="MVTec AD", learn=("train",), test=("test", "test_public")),
    _Layout(name="VisA", home=("data",), learn=("images",), test=("images",)),
    _Layout(name="plain folders"),
)
_BOXES, _BOX_COLUMNS = "boxes.csv", ("image", "x", "y", "width", "height")
_SPLITS, _SPLIT_LIST = "split_csv", "1cls.csv"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_HEADINGS = {
    "object": ("object", "category", "class"),
    "split": ("split", "set", "subset"),
    "image": ("image", "image_path", "path", "file"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledImage:
    """A test image: its defect type ("good" if normal) and, where known, its mask, which is a file
    or a folder of files (`read_mask` reads both)."""

    path: Location
    defect_type: str
    mask: Location | None = None

    @property
    def is_anomalous(self) -> bool:
        return self.defect_type != GOOD


@dataclass(frozen=True, kw_only=True, slots=True)
class Defect:
    """An image of a confirmed defect.

    Attributes:
        kind: the name of its folder, see `kind_problem`; empty where it lies in none.
        mask: as in `LabelledImage`.
        boxes: (x, y, width, height) in pixels of the image; empty where there are none.
    """

    path: Location
    kind: str
    mask: Location | None = None
    boxes: tuple[tuple[int, int, int, int], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """Normal images drawn from a category, no two of which show the same.

    Attributes:
        support: those to learn from.
        calibration: those to set a threshold from.
        copies: what was met on the way and left out.
    """

    support: tuple[Location, ...]
    calibration: tuple[Location, ...]
    copies: Copies


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

    def draw(self, shots: int, seed: int, *, calibration: int = 0) -> Draw:
        """`shots` normal images drawn by `seed`, and `calibration` further ones.

        Copies of one another count once. Fewer images are a part of what more would be. DataError
        if there are too few, or one cannot be read.
        """
        distinct = Distinct()
        drawn: list[Location] = []
        for path in random.Random(seed).sample(self.good, len(self.good)):
            if len(drawn) >= shots + calibration:
                break
            # Each by its own range: that of the category is found from what is drawn here.
            image = read_image(path, find_reading([path], ground="gray"))
            if distinct.admit(path, pixel_digest(image)):
                drawn.append(path)
        if min(shots - 1, calibration, len(drawn) - shots - calibration) < 0:
            copies = f" and {len(distinct.copies)} copies of these" if distinct.copies else ""
            further = f" and {calibration} more to calibrate" if calibration else ""
            raise DataError(
                f"category {self.name} has {len(self.good) - len(distinct.copies)} normal images"
                f"{copies} in {self.root}, {shots} shots{further} were asked for: add normal images"
                f" or ask for fewer"
            )
        return Draw(
            support=tuple(drawn[:shots]),
            calibration=tuple(drawn[shots:]),
            copies=distinct.copies,
        )

    def support_set(self, shots: int, seed: int) -> tuple[Location, ...]:
        """What `draw` gives to learn from."""
        return self.draw(shots, seed).support

    def draw_defects(self, count: int, seed: int) -> list["Defect"]:
        """`count` defective test images of each type, drawn by `seed`. DataError if a type would be
        left without an image to test."""
        images: dict[str, list[LabelledImage]] = defaultdict(list)
        for image in self.test:
            if image.is_anomalous:
                images[image.defect_type].append(image)
        for kind, own in images.items():
            if len(own) <= count:
                raise DataError(
                    f"category {self.name} has {len(own)} test images of {kind} in {self.root}, and"
                    f" {count} were asked for, beside which one is tested: ask for fewer"
                )
        return [
            Defect(path=image.path, kind=kind, mask=image.mask)
            for kind, own in images.items()
            for image in random.Random(seed).sample(own, count)
        ]

    def name_of(self, path: AnyPath) -> str:
        """Where an image lies below the category's folder: the same on disk and in S3."""
        return _below(self.root, absolute(path))

    @property
    def contents(self) -> str:
        """What was found, in one sentence: images, their kinds, masks."""
        kinds = Counter(image.defect_type for image in self.test)
        parts = [f"{len(self.good)} normal images to learn from"]
        if kinds:
            parts.append("to test " + ", ".join(f"{kinds[kind]} {kind}" for kind in sorted(kinds)))
        anomalous = [image for image in self.test if image.is_anomalous]
        lacking = [image for image in anomalous if image.mask is None]
        if anomalous and not lacking:
            parts.append("a mask of each defective one")
        elif lacking:
            masks = len(anomalous) - len(lacking)
            count = f"masks of {masks} of {len(anomalous)} defective ones" if masks else "no masks"
            first = f", {self.name_of(lacking[0].path)} has none" if masks else ""
            parts.append(f"{count} (no pixel metrics{first})")
        return f"{self.name}: {'; '.join(parts)}"


def find_categories(root: AnyPath, names: Sequence[str] = ()) -> list[Category]:
    """The categories in `root`, or `root` itself if it is one, sorted by name.

    With `names` only these are looked at. Raises DataError for whatever would make a category
    unusable or leaves open what is meant, with the path and the remedy.
    """
    root = absolute(root)
    if not root.is_dir():
        remedy = (
            "check bucket and prefix"
            if isinstance(root, S3Path)
            else "give an absolute path that exists on every node that reads it"
        )
        raise DataError(f"{root} is not a folder: {remedy}")
    top = _Folder(root)
    folders = {folder.name: folder for folder in ([top] if _is_category(top) else top.folders)}
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


def kind_problem(name: str) -> str:
    """Why a name cannot be that of a kind of defect; empty if it can.

    It is the name of a folder, and people read it: it has up to 64 characters that can be printed,
    and none of the names of folders that hold no defects.
    """
    if not 0 < len(name) <= LONGEST_KIND:
        return f"it has {len(name)} characters: give it 1 to {LONGEST_KIND}"
    if not name.isprintable():
        return f"{printable(name)} has characters that cannot be printed: leave them out"
    if name != name.strip() or "/" in name or "\\" in name:
        return f"{name!r} has a blank at an end, or / or \\: leave them out"
    if name.casefold() in _NORMAL | _MASKS:
        return f"{name} is the name of a folder without defects: give another"
    return ""


def find_defects(root: AnyPath) -> list[Defect]:
    """The images of confirmed defects in a folder, those of a kind in a folder of its name; or the
    defective images of a category, in whatever layout.

    Raises DataError for whatever leaves open what is meant, with the path and the remedy.
    """
    root = absolute(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: give one with images of confirmed defects")
    folder = _Folder(root)
    places = _places(folder)
    if places is not None:
        home, masks = places.test, places.masks
    else:
        home, masks = folder, folder.child(_MASKS)
        if product := next((each for each in folder.folders if _places(each) is not None), None):
            raise DataError(
                f"{root} holds products, such as {product.name}, and not kinds of defects:"
                f" {_EXPECTED}, such as {product.path}"
            )
    if home is None:
        raise DataError(f"{root} is a product without test images: {_EXPECTED}")
    images = {
        kind: kind.images
        for kind in (home, *home.folders)
        if not kind.is_normal and kind.name.casefold() not in _MASKS
    }
    for kind, paths in images.items():
        if not paths and kind is not home:
            raise DataError(
                f"{kind.path} is a kind of defect without images (found: {kind.contents}): put"
                f" {_IMAGES} directly into it, or take it away"
            )
    mask_of = {} if masks is None else _match(masks, images)
    boxes_of = _read_boxes(root)
    found = [
        Defect(
            path=path,
            kind="" if kind is home else kind.name,
            mask=mask_of.get(path),
            boxes=boxes_of.pop(_below(root, path), ()),
        )
        for kind, paths in images.items()
        for path in paths
    ]
    if not found:
        raise DataError(
            f"{root} holds no image of a defect (found: {folder.contents}): put {_IMAGES} into a"
            f" folder for each kind of defect, such as {root / 'scratch'}"
        )
    if boxes_of:
        raise DataError(
            f"{root / _BOXES} names {next(iter(boxes_of))}, which is no image of a defect in"
            f" {root}: correct its name, or take the line away"
        )
    return found


def _read_boxes(root: Location) -> dict[str, tuple[tuple[int, int, int, int], ...]]:
    """Name of an image below `root` -> its boxes, as the file beside the images says."""
    file = root / _BOXES
    if not file.is_file():
        return {}
    boxes: dict[str, tuple[tuple[int, int, int, int], ...]] = defaultdict(tuple)
    lines = read_file(file).decode("utf-8-sig", errors="replace").splitlines()
    for number, row in enumerate(csv.reader(lines), 1):
        if not row or [cell.strip().casefold() for cell in row] == list(_BOX_COLUMNS):
            continue
        try:
            name, *numbers = (cell.strip() for cell in row)
            x, y, width, height = map(int, numbers)
        except ValueError:
            raise DataError(
                f"line {number} of {file} is not {','.join(_BOX_COLUMNS)} in whole pixels, such as"
                f" scratch/a.png,10,20,64,32: correct it"
            ) from None
        boxes[name] += ((x, y, width, height),)
    return dict(boxes)


def images_below(folder: Path) -> list[Path]:
    """The images in a folder and in its folders, sorted by name; hidden ones are left out."""
    listed = [path for path in visible(folder) if isinstance(path, Path)]
    found = [path for path in listed if is_image_file(path)]
    for inner in listed:
        if inner.is_dir() and not inner.is_symlink():  # which may lead back here
            found += images_below(inner)
    return found


def support_hash(paths: Sequence[AnyPath]) -> str:
    """SHA-256 over the digests of the files' bytes, whatever their names and order."""
    digests = [bytes.fromhex(file_sha256(path)) for path in paths]
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


class _Folder:
    """A folder that is listed once, however often it is asked."""

    def __init__(self, path: Location) -> None:
        self.path = path
        self.name = path.name

    @property
    def is_normal(self) -> bool:
        return self.name.casefold() in _NORMAL

    @cached_property
    def _listed(self) -> list[Location]:
        return visible(self.path)

    @property
    def contents(self) -> str:
        """What is in it, for a message."""
        names = [printable(path.name) for path in self._listed]
        return ", ".join(names[:3] + ["..."] * (len(names) > 3)) or "nothing"

    @cached_property
    def folders(self) -> tuple["_Folder", ...]:
        """Those in it, without VisA's lists."""
        return tuple(
            _Folder(path) for path in self._listed if path.name != _SPLITS and path.is_dir()
        )

    @cached_property
    def files(self) -> tuple[Location, ...]:
        """Its image files, masks or not."""
        return tuple(path for path in self._listed if is_image_file(path))

    @cached_property
    def images(self) -> tuple[Location, ...]:
        """The same, which must all be images. Raises DataError."""
        stems = {_stem(path.name) for path in self.files}
        for path in self.files:
            bare = _unmarked(path.name)
            if bare != _stem(path.name) and bare in stems:
                raise DataError(
                    f"{path} looks like the mask of the image beside it: move masks into the"
                    f" category's folder ground_truth, or rename it"
                )
        return self.files

    def child(self, names: Collection[str]) -> "_Folder | None":
        """The folder of one of these names, or this one if there are no names. Raises DataError if
        there is more than one."""
        if not names:
            return self
        return _only(folder for folder in self.folders if folder.name.casefold() in names)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Places:
    """Where a category keeps its images, whatever its layout; None where there is no such folder.

    Attributes:
        normal: images to learn from.
        test: folders of test images by kind.
        masks: folders of masks by kind, and masks that lie directly in it.
    """

    layout: str
    learn: _Folder
    normal: _Folder | None
    test: _Folder | None
    masks: _Folder | None


def _places(folder: _Folder) -> _Places | None:
    """The places of a category in one of the layouts; None if it is in none of them."""
    found = []
    for layout in _LAYOUTS:
        home = folder.child(layout.home)
        learn = home and home.child(layout.learn)
        normal = learn and learn.child(_NORMAL)
        # Without a folder to learn from, that of normal images tells a category.
        if home and learn and (layout.learn or normal):
            test = home.child(layout.test)
            places = dict.fromkeys(place for place in (home, test) if place)
            masks = [place.child(_MASKS) for place in places]
            found.append(
                _Places(
                    layout=layout.name,
                    learn=learn,
                    normal=normal,
                    test=test,
                    masks=_only(place for place in masks if place),
                )
            )
    if len(found) > 1:
        raise DataError(
            f"{folder.path} is in two layouts, {found[0].layout} and {found[1].layout}: take one"
            f" away or rename it, {found[0].learn.path} or"
            f" {(found[1].normal or found[1].learn).path}"
        )
    return found[0] if found else None


def _only(folders: Iterable[_Folder]) -> _Folder | None:
    """The one folder, if there is one. Raises DataError if there are more."""
    found = list(folders)
    if len(found) > 1:
        raise DataError(
            f"{found[0].path} and {found[1].path} stand for the same: put what they hold into one"
            f" of them, or rename one"
        )
    return found[0] if found else None


def _is_category(folder: _Folder) -> bool:
    return _places(folder) is not None or (bool(folder.files) and not folder.folders)


def _read_category(folder: _Folder) -> Category:
    if not _NAME.fullmatch(folder.name):
        raise DataError(
            f"{folder.name!r} cannot name a category: rename the folder {folder.path} "
            "so that it has only letters, digits, '-' and '_'"
        )
    places = _places(folder)
    if places is None and folder.folders:
        raise DataError(
            f"category {folder.path} has folders but none with normal images: move these to "
            f"{folder.path / GOOD}, or name the categories to use"
        )
    if places is None:
        normal, good = folder.path, folder.images
        test = [LabelledImage(path=path, defect_type=GOOD) for path in good]
    else:
        normal = places.normal.path if places.normal else places.learn.path / GOOD
        good, test = _read_images(folder, places)
    if not good:
        raise DataError(
            f"category {folder.name} has no normal image: put {_IMAGES} into {normal},"
            f" or remove the folder {folder.path}"
        )
    return Category(name=folder.name, root=folder.path, good=good, test=tuple(test))


def _read_images(
    folder: _Folder, places: _Places
) -> tuple[tuple[Location, ...], list[LabelledImage]]:
    """The normal images to learn from, and the test images with their masks."""
    good = places.normal.images if places.normal else ()
    if places.test is None:
        return good, []
    kinds = [kind for kind in places.test.folders if kind.name.casefold() not in _MASKS]
    _only(kind for kind in kinds if kind.is_normal)
    images = {kind: kind.images for kind in kinds}
    if places.normal is not None and places.normal in images:
        good, images[places.normal] = _split(folder, places.normal)
    masks = {} if places.masks is None else _match(places.masks, images)
    return good, [
        LabelledImage(
            path=path, defect_type=GOOD if kind.is_normal else kind.name, mask=masks.get(path)
        )
        for kind in kinds
        for path in images[kind]
    ]


def _match(
    masks: _Folder, images: Mapping[_Folder, Sequence[Location]]
) -> dict[Location, Location]:
    """The masks of defective images, files or folders of files, by the image."""
    normal = {_stem(p.name) for kind, paths in images.items() if kind.is_normal for p in paths}
    defective = {kind: list(paths) for kind, paths in images.items() if not kind.is_normal}
    of_kind = {kind: masks.child({kind.name.casefold()}) for kind in images}
    loose = [folder for folder in masks.folders if folder not in of_kind.values()]
    everything = [path for paths in defective.values() for path in paths]
    groups = [(masks.files, loose, everything)]
    groups += [
        (folder.files, [*folder.folders], paths)
        for kind, paths in defective.items()
        if (folder := of_kind[kind])
    ]
    mask_of: dict[Location, Location] = {}
    spare: list[Location] = []
    for files, folders, paths in groups:
        by_stem: dict[str, list[Location]] = defaultdict(list)
        for path in paths:
            by_stem[_stem(path.name)].append(path)
        for mask in (*files, *(folder.path for folder in folders)):
            names = (_stem(mask.name), _unmarked(mask.name))
            owners = next((by_stem[name] for name in names if name in by_stem), [])
            if len(owners) > 1:
                raise DataError(
                    f"the mask {mask} may be that of {owners[0]} or of {owners[1]}: put masks into"
                    f" {masks.path / '<defect type>'}, and give each image a name of its own"
                )
            is_of_normal = paths is everything and normal.intersection(names)
            if not owners and not is_of_normal:
                spare.append(mask)
            for owner in owners:
                if owner in mask_of:
                    raise DataError(
                        f"{owner} has two masks, {mask_of[owner]} and {mask}: take one away"
                    )
                mask_of[owner] = mask
    lacking = next((path for path in everything if path not in mask_of), None)
    if spare and lacking is not None:
        raise DataError(
            f"{spare[0]} is the mask of no defective image, while {lacking} has none: name each"
            f" mask like its image, as {lacking.stem}_mask.png, or take it away"
        )
    return mask_of


def _stem(name: str) -> str:
    """A name in small letters without what it ends in, as often as that is that of an image."""
    name = name.casefold()
    while (dot := name.rfind(".")) > 0 and name[dot:] in IMAGE_SUFFIXES:
        name = name[:dot]
    return name


def _unmarked(name: str) -> str:
    """The same without what marks a mask."""
    return _stem(_MARK.sub("", _stem(name)))


def _split(folder: _Folder, normal: _Folder) -> tuple[tuple[Location, ...], tuple[Location, ...]]:
    """The normal images to learn from and those to test, all in both without VisA's list."""
    split_list = folder.path.parent / _SPLITS / _SPLIT_LIST
    if not split_list.is_file():
        return normal.images, normal.images
    split = _read_split(split_list)
    place = folder.name.casefold(), normal.name.casefold()
    good, tested = (
        tuple(path for path in normal.images if split.get((*place, path.name.casefold())) == part)
        for part in ("train", "test")
    )
    if not good and normal.images:
        first = _below(folder.path, normal.images[0])
        raise DataError(
            f"{split_list} sets no image of {normal.path} aside for training: it must have lines"
            f" such as {folder.name},train,{folder.name}/{first}, or take it away"
        )
    return good, tested


def _below(folder: Location, path: Location) -> str:
    return "/".join(path.parts[len(folder.parts) :])


def _read_split(path: Location) -> dict[tuple[str, ...], str]:
    """Category, kind and name of the images, in small letters -> their part of the split."""
    data = read_file(path)
    try:
        text = data.decode("utf-16" if data.startswith(_UTF16) else "utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    header, *lines = text.splitlines() or [""]
    delimiter = max(",;\t", key=header.count)
    titles = [title.strip().casefold() for title in next(csv.reader([header], delimiter=delimiter))]
    place = {
        heading: column
        for heading, meant in _HEADINGS.items()
        for column, title in enumerate(titles)
        if title in meant
    }
    if missing := [heading for heading in _HEADINGS if heading not in place]:
        raise DataError(
            f"{path} has no column {', '.join(missing)} but {', '.join(titles)}: name its columns"
            f" object, split and image"
        )
    split = dict[tuple[str, ...], str]()
    for row in csv.reader(lines, delimiter=delimiter):
        if len(row) > max(place.values()):
            category, part, image = (row[place[heading]].strip().casefold() for heading in place)
            split[(category, *PureWindowsPath(image).parts[-2:])] = part
    return split
