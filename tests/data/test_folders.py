import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from apt_ray.data.folders import (
    Category,
    find_categories,
    find_defects,
    kind_problem,
    support_hash,
)
from apt_ray.errors import DataError
from apt_ray.images import read_image


def touch(root: Path, *names: str) -> None:
    """Folder scans never open an image, so any bytes will do."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


@pytest.fixture
def mvtec(tmp_path: Path) -> Path:
    touch(
        tmp_path,
        "nut/train/good/001.png",
        "nut/train/good/000.png",
        "nut/train/good/002.JPG",
        "nut/train/good/.hidden.png",
        "nut/train/good/notes.txt",
        "nut/test/good/000.png",
        "nut/test/bent/000.png",
        "nut/test/bent/001.png",
        "nut/test/scratch/000.png",
        "nut/ground_truth/bent/000_mask.png",
        "nut/ground_truth/bent/001_mask.png",
        "nut/ground_truth/bent/777_mask.png",
        "nut/ground_truth/scratch/000_mask.png",
        "bolt/train/good/000.png",
        "README.md",
        ".cache/x.png",
    )
    return tmp_path


def names(paths: tuple[Path, ...]) -> list[str]:
    return [path.name for path in paths]


def only(root: Path) -> Category:
    (category,) = find_categories(root)
    return category


def test_mvtec_layout(mvtec: Path) -> None:
    bolt, nut = find_categories(mvtec)
    assert (bolt.name, nut.name) == ("bolt", "nut")
    assert names(nut.good) == ["000.png", "001.png", "002.JPG"]
    assert [(image.defect_type, image.path.name) for image in nut.test] == [
        ("bent", "000.png"),
        ("bent", "001.png"),
        ("good", "000.png"),
        ("scratch", "000.png"),
    ]
    assert [image.is_anomalous for image in nut.test] == [True, True, False, True]
    truth = mvtec / "nut" / "ground_truth"
    assert [image.mask for image in nut.test] == [
        truth / "bent" / "000_mask.png",
        truth / "bent" / "001_mask.png",
        None,
        truth / "scratch" / "000_mask.png",
    ]
    assert nut.has_masks
    assert bolt.test == ()
    assert not bolt.has_masks


def test_a_category_can_be_given_directly(mvtec: Path) -> None:
    assert only(mvtec / "nut") in find_categories(mvtec)
    assert find_categories(mvtec / "nut", ["nut"]) == find_categories(mvtec, ["nut"])


def test_partial_masks_are_no_masks(mvtec: Path) -> None:
    for name in ("001", "777"):
        (mvtec / f"nut/ground_truth/bent/{name}_mask.png").unlink()
    nut = only(mvtec / "nut")
    assert [image.mask is None for image in nut.test] == [False, True, True, False]
    assert not nut.has_masks


LAYOUTS = {
    "MVTec AD": ("train/good/0.png", "test/{good,cut}/7.png", "ground_truth/cut/7_mask.png"),
    "MVTec AD 2": (
        "train/good/0.png",
        "test_public/{good,bad}/7_regular.png",
        "test_public/ground_truth/bad/7_regular_mask.png",
    ),
    "LOCO": (
        "train/good/0.png",
        "test/{good,logical_anomalies}/7.png",
        "ground_truth/logical_anomalies/7/{000,001}.png",
    ),
    "BTAD": ("train/ok/0.bmp", "test/{ok,ko}/7.bmp", "ground_truth/ko/7.png"),
    "VisA": (
        "Data/Images/Normal/7.JPG",
        "Data/Images/Anomaly/7.JPG",
        "Data/Masks/Anomaly/7.png",
    ),
    "plain": ("good/7.png", "cut/7.png", "ground_truth/cut/7.png"),
    "in capitals": ("Train/OK/0.png", "Test/{Good,Cut}/7.png", "Ground_Truth/cut/7.png"),
    "masks without kinds": ("train/good/0.png", "test/{good,cut}/7.png", "masks/7.png"),
}


@pytest.mark.parametrize("files", LAYOUTS.values(), ids=LAYOUTS)
def test_each_layout_with_its_masks(tmp_path: Path, files: tuple[str, ...]) -> None:
    """What else is published with it, and what systems leave there, is passed over."""
    touch(tmp_path, *(f"cup/{name}" for file in files for name in spread(file)))
    touch(
        tmp_path,
        *("cup/defects_config.json", "cup/license.txt", "license.txt", "split_csv/readme.txt"),
        *("@eaDir/cup/good/0.png", "__MACOSX/cup/good/0.png", "#recycle/good/0.png"),
    )
    if "train" in files[0]:
        touch(tmp_path, "cup/validation/good/0.png", "cup/test_private/0.png")
    folders = [path for path in tmp_path.rglob("*") if path.is_dir() and list(path.iterdir())]
    for folder in folders:
        touch(folder, "@eaDir/7.png/SYNOPHOTO_THUMB_M.jpg", "._7.png", "Thumbs.db")
    cup = only(tmp_path)
    assert only(tmp_path / "cup") == cup
    assert [path.relative_to(cup.root).as_posix() for path in cup.good] == [files[0]]
    defective, good = sorted(cup.test, key=lambda image: not image.is_anomalous)
    assert good.defect_type == "good"
    assert good.mask is None
    assert defective.path.stem == good.path.stem
    assert defective.mask is not None
    found = [*defective.mask.iterdir()] if defective.mask.is_dir() else [defective.mask]
    masks = {path.relative_to(cup.root).as_posix() for path in found if path.name[0] not in ".@T"}
    assert masks == {*spread(files[-1])}
    assert cup.has_masks
    kind = defective.defect_type
    assert cup.contents == (
        f"cup: 1 normal images to learn from; to test {', '.join(sorted((f'1 {kind}', '1 good')))};"
        " a mask of each defective one"
    )


def spread(pattern: str) -> list[str]:
    """What a shell makes of braces."""
    head, brace, rest = pattern.partition("{")
    options, _, tail = rest.partition("}")
    return [f"{head}{option}{tail}" for option in options.split(",")] if brace else [pattern]


@pytest.mark.parametrize(
    "mask",
    [
        *("7.png", "7_mask.png", "7_gt.png", "7-mask.PNG", "7_Mask.bmp", "7.tif", "7_mask.tiff"),
        *("7.jpg", "7_mask.JPG", "7.webp", "7.png.png", "7.jpg_mask.png", "7.mask.png"),
        *("7_ground_truth.png", "7_groundtruth.png", "7_label.bmp", "7_masks.png"),
    ],
)
def test_a_mask_bears_the_name_of_its_image(tmp_path: Path, mask: str) -> None:
    touch(tmp_path, "a/train/good/0.jpg", "a/test/cut/7.jpg", f"a/ground_truth/cut/{mask}")
    assert only(tmp_path).test[0].mask == tmp_path / "a/ground_truth/cut" / mask


def test_images_may_be_named_like_masks(tmp_path: Path) -> None:
    touch(tmp_path, "a/train/good/0_mask.jpg", "a/test/cut/blue_label.jpg", "a/test/cut/red.jpg")
    touch(tmp_path, "a/ground_truth/cut/blue_label.png", "a/ground_truth/cut/red_label.png")
    assert [str(image.mask)[-14:] for image in only(tmp_path).test] == [
        *("blue_label.png", "/red_label.png"),
    ]


AMBIGUOUS = {
    "two masks": (
        ["test/cut/7.png", "ground_truth/cut/7_mask.png", "ground_truth/cut/7.bmp"],
        r"test/cut/7\.png has two masks, .*7\.bmp and .*7_mask\.png: take one away",
    ),
    "two images": (
        ["test/cut/7.png", "test/cut/7.jpg", "ground_truth/cut/7.png"],
        r"mask .*cut/7\.png may be that of .*7\.jpg or of .*7\.png: .* name of its own",
    ),
    "two kinds": (
        ["test/cut/7.png", "test/hole/7.png", "ground_truth/7.png"],
        r"mask .*ground_truth/7\.png may be that of .*cut/7\.png or of .*hole/7\.png: put masks",
    ),
    "another name": (
        ["test/cut/7.png", "test/good/8.png", "ground_truth/cut/8.png"],
        r"cut/8\.png is the mask of no defective image, while .*cut/7\.png has none: name each",
    ),
    "another kind": (
        ["test/cut/7.png", "ground_truth/hole/7.png"],
        r"ground_truth/hole is the mask of no defective image, while .*cut/7\.png has none",
    ),
    "beside the image": (
        ["test/cut/7.png", "test/cut/7_mask.png"],
        r"7_mask\.png looks like the mask of the image beside it: move masks into",
    ),
    "beside the normal image": (
        ["train/good/0_GT.png"],
        r"0_GT\.png looks like the mask of the image beside it: move masks into",
    ),
    "two places": (
        ["test/cut/7.png", "ground_truth/cut/7.png", "test/masks/cut/7.png"],
        r"cup/ground_truth and .*cup/test/masks stand for the same",
    ),
    "two folders of normal images": (
        ["train/ok/0.png"],
        r"train/good and .*train/ok stand for the same: put what they hold into one",
    ),
    "two kinds of normal images": (
        ["test/good/0.png", "test/ok/0.png"],
        r"test/good and .*test/ok stand for the same",
    ),
    "two tests": (
        ["test/cut/0.png", "test_public/cut/0.png"],
        r"test and .*test_public stand for the same",
    ),
    "two layouts": (
        ["good/0.png"],
        r"cup is in two layouts, MVTec AD and plain folders: .*cup/train or .*cup/good",
    ),
}


@pytest.mark.parametrize(("files", "message"), AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_what_is_ambiguous_is_named(tmp_path: Path, files: list[str], message: str) -> None:
    touch(tmp_path, "cup/train/good/0.png", *(f"cup/{file}" for file in files))
    with pytest.raises(DataError, match=message):
        find_categories(tmp_path)
    with pytest.raises(DataError, match=message):
        find_categories(tmp_path / "cup")


def test_the_contents_say_what_lacks_a_mask(mvtec: Path) -> None:
    bolt, _ = find_categories(mvtec)
    assert bolt.contents == "bolt: 1 normal images to learn from"
    shutil.rmtree(mvtec / "nut/ground_truth/bent")
    assert only(mvtec / "nut").contents == (
        "nut: 3 normal images to learn from; to test 2 bent, 1 good, 1 scratch; masks of 1 of 3"
        " defective ones (no pixel metrics, test/bent/000.png has none)"
    )
    shutil.rmtree(mvtec / "nut/ground_truth")
    assert only(mvtec / "nut").contents.endswith("1 scratch; no masks (no pixel metrics)")


def test_plain_layout(tmp_path: Path) -> None:
    touch(
        tmp_path,
        *(f"cup/good/{index}.png" for index in range(4)),
        "cup/chip/0.png",
        "cup/ground_truth/chip/0_mask.png",
    )
    cup = only(tmp_path)
    assert names(cup.good) == ["0.png", "1.png", "2.png", "3.png"]
    assert [image.defect_type for image in cup.test] == ["chip"] + ["good"] * 4
    assert cup.has_masks
    assert only(tmp_path / "cup") == cup


def test_pictures_alone_are_all_good(tmp_path: Path) -> None:
    touch(tmp_path, "cup/0.png", "cup/1.webp")
    cup = only(tmp_path)
    assert names(cup.good) == ["0.png", "1.webp"]
    assert not any(image.is_anomalous for image in cup.test)
    assert only(tmp_path / "cup") == cup


def test_stray_pictures_beside_categories_are_ignored(mvtec: Path) -> None:
    touch(mvtec, "overview.png")
    assert [category.name for category in find_categories(mvtec)] == ["bolt", "nut"]


def test_names_choose_and_spare_the_rest(mvtec: Path) -> None:
    (mvtec / "unfinished").mkdir()
    assert [c.name for c in find_categories(mvtec, ["nut", "bolt"])] == ["bolt", "nut"]
    with pytest.raises(DataError, match="has no category gear; it has bolt, nut, unfinished"):
        find_categories(mvtec, ["nut", "gear"])


def test_relative_roots_become_absolute(mvtec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mvtec / "nut")
    category = only(Path())
    assert category.name == "nut"
    assert category.good[0].is_absolute()


def draw_images(folder: Path, levels: Sequence[int]) -> None:
    """So many images, 00.png and so on, each of one level of gray."""
    folder.mkdir(parents=True)
    for place, level in enumerate(levels):
        Image.new("L", (4, 4), level).save(folder / f"{place:02d}.png")


def test_support_sets_are_seeded_and_nested(tmp_path: Path) -> None:
    draw_images(tmp_path / "cup/good", range(30))
    cup = only(tmp_path)
    four = cup.support_set(4, seed=1)
    assert len(set(four)) == 4
    assert four == cup.support_set(4, seed=1)
    assert four != cup.support_set(4, seed=2)
    assert four[:2] == cup.support_set(2, seed=1)
    assert set(cup.support_set(30, seed=0)) == set(cup.good)


def test_calibration_sets_are_seeded_nested_and_apart_from_the_support_set(tmp_path: Path) -> None:
    draw_images(tmp_path / "cup/train/good", range(30))
    cup = only(tmp_path)
    ten = cup.draw(4, seed=1, calibration=10)
    assert ten.support == cup.support_set(4, seed=1)
    assert len({*ten.support, *ten.calibration}) == 14
    assert ten.copies == ()
    assert ten.calibration != cup.draw(4, seed=2, calibration=10).calibration
    assert ten.calibration[:3] == cup.draw(4, seed=1, calibration=3).calibration
    assert cup.draw(4, seed=1).calibration == ()
    everything = cup.draw(4, seed=0, calibration=26)
    assert {*everything.support, *everything.calibration} == {*cup.good}
    for count in (27, -1):
        with pytest.raises(DataError, match=rf"cup has 30 normal images .* and {count} more to"):
            cup.draw(4, seed=0, calibration=count)


@pytest.mark.parametrize("shots", [0, 3])
def test_too_many_shots(tmp_path: Path, shots: int) -> None:
    draw_images(tmp_path / "cup/good", range(2))
    with pytest.raises(DataError, match=f"cup has 2 normal images .* {shots} shots were asked for"):
        only(tmp_path).support_set(shots, seed=0)


@pytest.mark.parametrize("seed", range(4))
def test_a_draw_leaves_copies_out(tmp_path: Path, seed: int) -> None:
    draw_images(tmp_path / "cup/good", [level for level in range(4) for _ in range(6)])
    cup = only(tmp_path)
    drawn = cup.draw(2, seed, calibration=2)
    shown = {read_image(path).getpixel((0, 0)) for path in (*drawn.support, *drawn.calibration)}
    assert len(shown) == 4
    for copy, first in drawn.copies:
        assert int(copy[:2]) // 6 == int(first[:2]) // 6
    with pytest.raises(DataError, match=r"4 normal images and 20 copies of these .* 5 shots were"):
        cup.support_set(5, seed)


def test_missing_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"{tmp_path}/nowhere is not a folder.*every node"):
        find_categories(Path("nowhere"))


def test_no_category(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path} holds no category"):
        find_categories(tmp_path)


@pytest.mark.parametrize(
    ("file", "home"),
    [
        ("cup/notes.txt", "cup"),
        ("cup/train/good/notes.txt", "cup/train/good"),
        ("cup/train/0.png", "cup/train/good"),
        ("cup/good/notes.txt", "cup/good"),
    ],
)
def test_no_good_image(tmp_path: Path, file: str, home: str) -> None:
    touch(tmp_path, file)
    with pytest.raises(DataError, match=f"cup has no normal image: put .* into {tmp_path / home},"):
        find_categories(tmp_path)


def test_defects_without_a_good_folder(tmp_path: Path) -> None:
    touch(tmp_path, "cup/0.png", "cup/chip/0.png")
    with pytest.raises(DataError, match=f"move these to {tmp_path}/cup/good"):
        find_categories(tmp_path)


@pytest.mark.parametrize("name", ["metal nut", "schräg", "a.b", "a%2Fb"])
def test_names_must_fit_into_an_address(tmp_path: Path, name: str) -> None:
    touch(tmp_path, f"{name}/good/0.png")
    with pytest.raises(DataError, match="rename the folder"):
        find_categories(tmp_path)


def test_categories_travel_between_processes(mvtec: Path) -> None:
    categories = find_categories(mvtec)
    assert pickle.loads(pickle.dumps(categories)) == categories  # noqa: S301 (our own bytes)


def test_support_hash_depends_on_content_only(tmp_path: Path) -> None:
    for name, content in {"a": b"1", "b": b"2", "c": b"1", "d": b"12", "e": b""}.items():
        (tmp_path / name).write_bytes(content)
    a, b, c, d, e = (tmp_path / name for name in "abcde")
    assert support_hash([a, b]) == support_hash([b, c])
    assert support_hash([a, b]) != support_hash([d, e])
    assert support_hash([a]) != support_hash([a, c])
    with pytest.raises(DataError, match="cannot read"):
        support_hash([tmp_path / "none"])


@pytest.fixture
def visa(tmp_path: Path) -> Path:
    """A category as VisA is published."""
    touch(
        tmp_path,
        *(f"candle/Data/Images/Normal/{i:04d}.JPG" for i in range(5)),
        *(f"candle/Data/Images/Anomaly/{i:03d}.JPG" for i in (0, 1)),
        *(f"candle/Data/Masks/Anomaly/{i:03d}.png" for i in (0, 1)),
        "candle/image_anno.csv",
    )
    rows = ["object,split,label,image,mask"]
    rows += [
        f"candle,{split},normal,candle/Data/Images/Normal/{i:04d}.JPG,"
        for i, split in enumerate(("train", "train", "test", "train", "test"))
    ]
    rows += [
        f"candle,test,anomaly,candle/Data/Images/Anomaly/{i:03d}.JPG,"
        f"candle/Data/Masks/Anomaly/{i:03d}.png"
        for i in (0, 1)
    ]
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv" / "1cls.csv").write_text("\r\n".join(rows))
    return tmp_path


def test_visa_layout(visa: Path) -> None:
    (candle,) = find_categories(visa)
    assert names(candle.good) == ["0000.JPG", "0001.JPG", "0003.JPG"]
    assert [(image.defect_type, image.path.name) for image in candle.test] == [
        ("Anomaly", "000.JPG"),
        ("Anomaly", "001.JPG"),
        ("good", "0002.JPG"),
        ("good", "0004.JPG"),
    ]
    assert candle.test[0].mask == visa / "candle/Data/Masks/Anomaly/000.png"
    assert candle.has_masks
    assert only(visa / "candle") == candle


def test_visa_without_its_list_is_not_split(visa: Path) -> None:
    (visa / "split_csv" / "1cls.csv").unlink()
    (candle,) = find_categories(visa)
    assert len(candle.good) == 5
    assert len(candle.test) == 2 + 5


def test_visa_lists_as_spreadsheets_save_them(visa: Path) -> None:
    expected = find_categories(visa)
    split_list = visa / "split_csv" / "1cls.csv"
    lines = split_list.read_text().splitlines()
    text = "\r\n".join(lines)
    for data in (
        text.replace(",", ";").encode(),
        text.replace(",", "\t").encode("utf-8-sig"),
        text.replace(",", "\t").encode("utf-16"),
        text.replace("/", "\\").encode(),
        text.replace("object,split,label,image", "Class, Set ,Label,Image_Path").encode(),
        text.replace("object,split", '"Object","Split"').replace("train", " Train ").encode(),
        text.replace("candle/Data", "./VisA/Candle/Data").encode(),
        (text + "\r\nbougie,train,normal,bougie/Data/Images/Normal/é.JPG,").encode("latin-1"),
        ("\r\n".join([lines[0], "", *lines[1:], ",,,,", ""])).encode(),
    ):
        split_list.write_bytes(data)
        assert find_categories(visa) == expected, data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("object,", "thing,"), r"1cls\.csv has no column object but thing, split, .*: name its"),
        (("object,split,label,image", "a,b,c,d"), "has no column object, split, image but a, b"),
        (
            ("candle,", "candles,"),
            r"1cls\.csv sets no image of .*Normal aside for training",
        ),
        (
            (",train,", ",learn,"),
            "lines such as candle,train,candle/Data/Images/Normal/0000.JPG",
        ),
    ],
)
def test_a_visa_list_that_cannot_be_read_is_named(
    visa: Path, change: tuple[str, str], message: str
) -> None:
    split_list = visa / "split_csv" / "1cls.csv"
    split_list.write_text(split_list.read_text().replace(*change))
    with pytest.raises(DataError, match=message):
        find_categories(visa)
    split_list.write_text("")
    with pytest.raises(DataError, match="has no column object, split, image"):
        find_categories(visa)


def test_confirmed_defects_are_read_by_kind(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "some.png",
        "scratch/a.png",
        "scratch/b.png",
        "pit/a.png",
        "good/a.png",
        "ground_truth/scratch/a_mask.png",
    )
    (tmp_path / "boxes.csv").write_text(
        "image,x,y,width,height\npit/a.png, 1, 2, 3, 4\npit/a.png,5,6,7,8\nsome.png,0,0,9,9\n"
    )
    found = {(defect.kind, defect.path.name): defect for defect in find_defects(tmp_path)}
    assert list(found) == [
        ("", "some.png"),
        ("pit", "a.png"),
        *(("scratch", n) for n in ("a.png", "b.png")),
    ]
    assert found["pit", "a.png"].boxes == ((1, 2, 3, 4), (5, 6, 7, 8))
    assert found["", "some.png"].boxes == ((0, 0, 9, 9),)
    assert found["scratch", "a.png"].mask == tmp_path / "ground_truth" / "scratch" / "a_mask.png"
    assert found["scratch", "b.png"].mask is None


def test_the_defective_images_of_a_category_are_confirmed_defects(mvtec: Path) -> None:
    found = find_defects(mvtec / "nut")
    assert [defect.kind for defect in found] == ["bent", "bent", "scratch"]
    assert all(defect.mask is not None for defect in found)


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        ("a.png,1,2,3", "line 1 of .*boxes.csv is not image,x,y,width,height"),
        ("a.png,1,2,3,wide", "line 1 of .*boxes.csv is not image,x,y,width,height"),
        ("b.png,1,2,3,4", "names b.png, which is no image of a defect"),
    ],
)
def test_boxes_that_say_nothing_are_refused(tmp_path: Path, boxes: str, said: str) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "boxes.csv").write_text(f"\n{boxes}\n".lstrip())
    with pytest.raises(DataError, match=said):
        find_defects(tmp_path)


def test_a_folder_without_defects_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "good/a.png")
    with pytest.raises(DataError, match=r"holds no image of a defect \(found: good\)"):
        find_defects(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        find_defects(tmp_path / "absent")


@pytest.mark.parametrize(
    ("files", "found"),
    [([], "nothing"), (["day1/a.png", "day2/a.png"], "day1, day2"), (["a.heic"], "a.heic")],
)
def test_a_kind_without_images_is_refused(tmp_path: Path, files: Sequence[str], found: str) -> None:
    touch(tmp_path, "pit/a.png", *(f"scratch/{file}" for file in files))
    (tmp_path / "scratch").mkdir(exist_ok=True)
    said = rf"{tmp_path}/scratch is a kind of defect without images \(found: {found}\): put PNG"
    with pytest.raises(DataError, match=said):
        find_defects(tmp_path)


def test_products_are_no_kinds(mvtec: Path) -> None:
    said = rf"holds products, such as bolt, .*for each kind of defect, .*such as {mvtec}/bolt"
    with pytest.raises(DataError, match=said):
        find_defects(mvtec)
    shutil.rmtree(mvtec / "nut" / "test")
    with pytest.raises(DataError, match="nut is a product without test images: give a folder"):
        find_defects(mvtec / "nut")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("scratch", ""),
        ("Kratzer, groß", ""),
        ("x" * 64, ""),
        ("", "0 characters"),
        ("x" * 65, "65 characters"),
        (" scratch", "a blank at an end"),
        ("scratch ", "a blank at an end"),
        ("a/b", "or /"),
        ("a\\b", "or /"),
        ("a\nb", r"a\nb has characters that cannot be printed"),
        ("\u202ehctarcs", r"\u202ehctarcs has characters"),
        ("\u200b", "cannot be printed"),
        ("\udcff", "cannot be printed"),
        ("good", "without defects"),
        ("OK", "without defects"),
        ("ground_truth", "without defects"),
    ],
)
def test_a_kind_is_named_so_that_people_can_read_it(name: str, problem: str) -> None:
    found = kind_problem(name)
    assert problem in found
    assert bool(problem) == bool(found)
