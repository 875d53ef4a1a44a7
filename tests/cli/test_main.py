import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from apt_ray.cli.main import main
from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.images import read_image
from apt_ray.validation.intervals import load_scores, save_scores


def test_fit_then_inspect_writes_overlays_and_results(
    sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    category = min(sample_data.iterdir())
    file = tmp_path / "set.safetensors"
    status = main(
        ["fit", "--data", str(category), "--out", str(file), "--shots", "2", "--steps", "2"]
    )
    assert status == 0
    assert "uncertified" in capsys.readouterr().out
    picture = min((category / "test" / "good").iterdir())
    results = tmp_path / "results.json"
    overlays = tmp_path / "overlays"
    status = main(
        ["inspect", str(file), str(picture), "--out", str(overlays), "--json", str(results)]
    )
    assert status == 0
    assert str(picture) in capsys.readouterr().out
    (row,) = json.loads(results.read_text())
    assert row["image"] == str(picture)
    assert read_image(Path(row["overlay"])).size == read_image(picture).size


def test_confirmed_defects_name_what_is_found(
    sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    category = min(sample_data.iterdir())
    confirmed, file, results = tmp_path / "confirmed", tmp_path / "set", tmp_path / "results.json"
    kinds = sorted(path.name for path in (category / "test").iterdir() if path.name != "good")
    for kind in kinds:
        (confirmed / kind).mkdir(parents=True)
        shutil.copy(min((category / "test" / kind).iterdir()), confirmed / kind / "a.png")
    fit = ["fit", "--data", str(category), "--out", str(file), "--shots", "2", "--steps", "2"]
    assert main([*fit, "--confirmed", str(confirmed)]) == 0
    assert "named by the others" in capsys.readouterr().out
    defect = confirmed / kinds[0] / "a.png"
    file = file.rename(tmp_path / "set.safetensors")
    prompt_set = PromptSet.load(file)
    prompt_set.with_threshold(prompt_set.threshold.moved_to(0.0)).save(file)
    assert main(["inspect", str(file), str(defect), "--json", str(results)]) == 0
    (row,) = json.loads(results.read_text())
    assert set(row["kinds"]) == set(kinds)
    assert max(row["kinds"], key=row["kinds"].__getitem__) == kinds[0]
    assert f"  {kinds[0]} 0." in capsys.readouterr().out


def test_every_switch_of_the_method_is_a_flag(
    sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    category = min(sample_data.iterdir())
    file = tmp_path / "set.safetensors"
    switches = (
        "--tiles 2 --attention value_value --reference-layers 1 3 --noise mixed --region everywhere"
        " --no-object-mask --anomalous-prompts 2 --margin-weight 0.5 --smgs penalty"
        " --no-self-optimising --reference-rotations 4 --reference-size 50"
    )
    arguments = ["fit", "--data", str(category), "--out", str(file), "--shots", "2", "--steps", "2"]
    assert main([*arguments, *switches.replace("everywhere", "object").split()]) == 0
    assert "4 passes of the vision tower" in capsys.readouterr().out
    prompt_set = PromptSet.load(file)
    assert prompt_set.backbone.tiles == 2
    assert prompt_set.text_features.shape[0] == 3
    assert {layer: len(rows) for layer, rows in prompt_set.memory.layers.items()} == {
        0: 50,
        1: 50,
        2: 50,
    }
    assert not prompt_set.settings.object_mask
    assert prompt_set.settings.smgs == "penalty"
    assert main(["inspect", str(file), str(min((category / "test" / "good").iterdir()))]) == 0
    with pytest.raises(SystemExit):
        main([*arguments, "--noise", "salt"])


def test_calibration_uses_the_other_good_pictures(
    sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    category = min(sample_data.iterdir())
    arguments = ["fit", "--data", str(category), "--out", str(tmp_path / "set.safetensors")]
    settings = ["--shots", "2", "--steps", "1", "--calibrate", "--false-alarm-rate", "0.2"]
    assert main([*arguments, *settings]) == 0
    assert "certified at 20.0%" in capsys.readouterr().out


def test_copies_certify_nothing_and_are_named(
    sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sorted((min(sample_data.iterdir()) / "train/good").iterdir())[:4]
    (tmp_path / "nut/good").mkdir(parents=True)
    for image in images:
        for copy in range(6):
            shutil.copy(image, tmp_path / f"nut/good/{image.stem} ({copy}).png")
    file = tmp_path / "set.safetensors"
    fit = ["fit", "--data", str(tmp_path / "nut"), "--out", str(file), "--steps", "1"]
    assert main([*fit, "--calibrate", "--shots", "2"]) == 0
    said = capsys.readouterr()
    assert "from 2 calibration images, uncertified" in said.out
    assert "warning: 20 images are copies by the pixels and left out" in said.err
    assert len(PromptSet.load(file).provenance.copies) == 20
    assert main([*fit, "--calibrate"]) == 1
    error = capsys.readouterr().err
    assert "4 normal images and 20 copies of these" in error
    assert "add normal images or ask for fewer" in error
    # All four are found among 24 files.
    assert main(fit) == 0
    assert "4 left-out support images" in capsys.readouterr().out
    assert len(set(PromptSet.load(file).provenance.support_names)) == 4


def test_compare_reads_what_evaluate_kept(
    sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = min(sample_data.iterdir()).name
    options = ["--categories", name, "--shots", "1", "--seeds", "0"]
    files = [str(tmp_path / f"{steps}.npz") for steps in ("1", "2")]
    for steps, file in zip(("1", "2"), files, strict=True):
        arguments = ["evaluate", "--data", str(sample_data), *options, "--steps", steps]
        assert main([*arguments, "--scores", file]) == 0
    capsys.readouterr()
    assert main(["compare", *files, "--json", str(tmp_path / "differences.json")]) == 0
    assert f"| {name} | prompts | image AUROC |" in capsys.readouterr().out
    differences = json.loads((tmp_path / "differences.json").read_text())
    assert {d["metric"] for d in differences} == {"image_auroc", "pixel_auroc"}
    after = load_scores(Path(files[1]))
    save_scores(Path(files[1]), [*after, replace(after[0], category="nut")])
    assert main(["compare", *files]) == 0
    assert "not compared: nut, prompts, seed 0, image AUROC: only after" in capsys.readouterr().err
    reference = [d for d in differences if d["variant"] == "reference"]
    assert all(d["low"] == d["high"] == 0 for d in reference), "steps do not change the memory"


def test_evaluate_prints_a_table_and_writes_every_result(
    sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    name = min(sample_data.iterdir()).name
    options = ["--categories", name, "--shots", "1", "--seeds", "0", "--steps", "1"]
    options += ["--calibrate", "1", "--confirm", "1", "--json", str(file)]
    assert main(["evaluate", "--data", str(sample_data), *options]) == 0
    printed = capsys.readouterr().out
    assert "| image AUROC |" in printed
    assert f"{name}: kinds by 1 confirmed defects of each" in printed
    results = json.loads(file.read_text())
    assert [result["variant"] for result in results] == ["prompts", "reference", "both"]
    assert set(results[0]) == {
        "variant",
        "category",
        "shots",
        "seed",
        "image_auroc",
        "pixel_auroc",
        "aupro",
        "copies",
        "good_rejected",
        "good_rejected_interval",
        "defects_found",
        "defects_found_interval",
        "defects_found_by_type",
        "kinds_named_right",
        "threshold",
    }
    assert results[-1]["threshold"]["source"] == "calibration images"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--data", "/no/such/folder", "--out", "x"], "/no/such/folder"),
        (["inspect", "/no/such/set.safetensors", "x.png"], "/no/such/set.safetensors"),
        (["evaluate", "--data", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_a_mistake_gives_one_clear_line_and_status_one(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("seeds", ["", "0,0", "one", "0,,1", "-1", "1e3", "9" * 30])
def test_odd_seeds_are_wrong_usage(seeds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "--data", "/absent", f"--seeds={seeds}"])
    assert "argument --seeds" in capsys.readouterr().err


def test_a_seed_that_is_too_large_is_a_setting_out_of_range(
    category: Category, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fit", "--data", str(category.root), "--out", str(tmp_path / "x")]
    assert main([*arguments, "--seed", "9" * 30]) == 1
    assert "seed: " in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--json", "--out"])
def test_results_that_cannot_be_written_are_one_clear_line(
    category: Category,
    prompt_set: PromptSet,
    tmp_path: Path,
    flag: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "set.safetensors"
    prompt_set.save(file)
    arguments = ["inspect", str(file), str(category.good[0]), flag, str(file / "results")]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot write {file}/results")
    assert error.endswith("or choose another place\n")
    assert PromptSet.load(file).provenance == prompt_set.provenance


@pytest.fixture
def set_file(prompt_set: PromptSet, tmp_path: Path) -> str:
    file = tmp_path / "set.safetensors"
    prompt_set.save(file)
    return str(file)


def run_program(arguments: Sequence[str], *, lines: int, **options: object) -> tuple[str, int, str]:
    """What the program prints until its reader goes, its status, and what it says on stderr."""
    program = subprocess.Popen(
        [sys.executable, "-m", "apt_ray", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    assert program.stdout is not None
    said = "".join(program.stdout.readline() for _ in range(lines))
    program.stdout.close()
    assert program.stderr is not None
    errors = program.stderr.read()
    program.stderr.close()
    return said, program.wait(), errors


def test_a_bad_file_is_a_row_with_the_reason_and_hidden_files_are_none(
    category: Category, set_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "day"
    (folder / ".cache").mkdir(parents=True)
    whole = category.good[0].read_bytes()
    for name, data in {
        "1.png": whole,
        "2.png": whole[: len(whole) // 2],
        "3.png": b"",
        "4.png": whole,
        "._1.png": b"\0\5\x16\7",
        ".cache/5.png": whole,
    }.items():
        (folder / name).write_bytes(data)
    file = tmp_path / "results.json"
    assert main(["inspect", set_file, str(folder), "absent.png", "--json", str(file)]) == 1
    rows = json.loads(file.read_text())
    names = [Path(row["image"]).name for row in rows]
    assert names == ["1.png", "2.png", "3.png", "4.png", "absent.png"]
    assert [row["error"] is None for row in rows] == [True, False, False, True, False]
    assert "2.png is damaged" in rows[1]["error"]
    assert rows[1]["is_anomalous"] is None
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()] == [
        *("normal", "error", "error", "normal", "error")
    ]
    assert said.err == "error: 3 of 5 images: see what is said of them\n"


def test_every_image_has_an_overlay_of_its_own(
    category: Category, set_file: str, tmp_path: Path
) -> None:
    day, out = tmp_path / "day", tmp_path / "out"
    for name in ("line1/cam/1.png", "line1/cam/1.jpg", "line2/cam/1.png", "1.png"):
        (day / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(category.good[0]).convert("RGB").save(day / name)
    for number, arguments in enumerate(([day], [day / "line1", day / "line2" / "cam"])):
        target = out / str(number)
        assert main(["inspect", set_file, *map(str, arguments), "--out", str(target)]) == 0
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))
    lines = ["line1/cam/1.jpg.png", "line1/cam/1.png.png", "line2/cam/1.png.png"]
    assert found == ["0/1.png.png", *(f"0/{name}" for name in lines), *(f"1/{n}" for n in lines)]


def test_overlays_are_no_images_of_the_next_run(
    category: Category, set_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    day = tmp_path / "day"
    day.mkdir()
    Image.open(category.good[0]).save(day / "1.png")
    for _ in range(2):
        assert main(["inspect", set_file, str(day), "--out", str(day / "overlays")]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 1
    assert [path.name for path in (day / "overlays").iterdir()] == ["1.png.png"]
    (tmp_path / "link").symlink_to(day)
    for out in (day, tmp_path / "link"):
        for given in (day, day / "1.png"):
            assert main(["inspect", set_file, str(given), "--out", str(out)]) == 1
            assert "would lie among images" in capsys.readouterr().err


def test_json_on_standard_output_is_alone_there(
    category: Category,
    set_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    image, scores = str(category.good[0]), str(tmp_path / "scores.npz")
    few = ["--shots", "1", "--seeds", "0", "--steps", "1"]
    for arguments, text in (
        (["inspect", set_file, image], image),
        (["evaluate", "--data", str(category.root), *few, "--scores", scores], "| image AUROC |"),
        (["compare", scores, scores], "| image AUROC |"),
        (["plan"], "replicas"),
        (["doctor", "--only", "home"], "home"),
    ):
        assert main([*arguments, "--json", "-"]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out)
        assert text in said.err
    assert not (tmp_path / "-").exists()


def test_a_reader_that_goes_away_ends_a_command_without_a_word(
    category: Category, set_file: str, tmp_path: Path
) -> None:
    folder, file = str(category.root / "test"), tmp_path / "results.json"
    arguments = ["inspect", set_file, folder, "--json", str(file)]
    said, status, errors = run_program(arguments, lines=1)
    assert (said.count("\n"), status, errors) == (1, 141, "")
    assert json.loads(file.read_text())[0]["error"] is None
    assert run_program(["--help"], lines=1)[1:] in ((141, ""), (0, ""))


def test_a_screen_that_takes_nothing_is_one_line(set_file: str, category: Category) -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "apt_ray", "inspect", set_file, str(category.good[0])],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ended.returncode == 1
    assert ended.stderr == "error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("device", ["cuda:99", "mps:7", "foo", "meta", ""])
def test_a_device_that_is_not_there_is_named_before_the_work(
    category: Category, set_file: str, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(category.root)
    for arguments in (
        ["inspect", set_file, str(category.good[0])],
        ["fit", "--data", data, "--out", f"{set_file}.new"],
        ["evaluate", "--data", data],
    ):
        assert main([*arguments, "--device", device]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: nothing can be computed on device {device!r} (")
        assert "use one that is here, cpu" in line


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("fit --data {data} --steps 100000", ("--out",)),
        ("inspect {set} {data}/train", ("--out", "--json")),
        ("evaluate --data {data} --steps 100000", ("--json", "--scores", "--report")),
        ("sample", ("--out",)),
        ("compare {set} {set}", ("--json",)),
    ],
)
def test_what_cannot_be_written_is_said_before_the_work(
    category: Category,
    set_file: str,
    tmp_path: Path,
    command: str,
    flags: Sequence[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "folder").mkdir()
    arguments = command.format(data=category.root, set=set_file).split()
    for flag in flags:
        for place in ("/proc/x", f"{set_file}/x", str(tmp_path / "folder")):
            is_for_files = flag in ("--out", "--report") and arguments[0] != "fit"
            if is_for_files and place.endswith("folder"):
                continue
            assert main([*arguments, flag, place]) == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"error: cannot write {place}")
            assert line.endswith("or choose another place")
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "set.safetensors"}


def test_a_disk_that_fills_up_during_the_work_loses_nothing(
    category: Category,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    full = tmp_path / "link"
    full.symlink_to("/dev/full")
    arguments = ["--data", str(category.root), "--shots", "1", "--steps", "1"]
    assert main(["fit", *arguments, "--out", str(full)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot write {full} (No space left on device): make room")
    kept = Path(error.rpartition("until then it is kept in ")[2].strip())
    assert PromptSet.load(kept).category == category.name
    files = ["--json", str(full), "--scores", str(tmp_path / "scores.npz")]
    assert main(["evaluate", *arguments, "--seeds", "0", *files]) == 1
    said = capsys.readouterr()
    assert "| image AUROC |" in said.out
    assert len(json.loads(Path(said.err.rpartition(" in ")[2].strip()).read_text())) == 3
    assert (tmp_path / "scores.npz").is_file()


def test_names_that_are_not_utf_8_are_shown_as_escapes(
    category: Category, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "part"
    for kind in ("train/good", "test/good", "test/kratzer"):
        (root / kind).mkdir(parents=True)
        for i in range(3):
            name = os.fsdecode(b"St\xfcck %d.png" % i)
            (root / kind / name).write_bytes(category.good[i].read_bytes())
    (root / "test/kratzer").rename(root / "test" / os.fsdecode(b"kr\xe4tzer"))
    one, results = str(tmp_path / "set.safetensors"), tmp_path / "results.json"
    data = ["--data", str(root), "--shots", "2", "--steps", "1"]
    assert main(["fit", *data, "--out", one]) == 0
    assert all("\\udcfc" in name for name in PromptSet.load(Path(one)).provenance.support_names)
    capsys.readouterr()
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    said, status, errors = run_program(
        ["inspect", one, str(root), "--json", str(results), "--out", str(tmp_path / "out")],
        lines=10,
        env=environment,
    )
    assert (said.count("\\udcfcck"), status, errors) == (9, 0, "")
    results.read_text().encode()
    assert "\\udcfcck 0.png" in json.loads(results.read_text())[0]["image"]
    files = ["--json", str(results), "--scores", f"{one}.npz", "--report", str(tmp_path / "page")]
    assert main(["evaluate", *data, "--seeds", "0", *files]) == 0
    assert "kr\\udce4tzer" in (tmp_path / "page" / "index.html").read_text()
    json.loads(results.read_text())
    assert main(["compare", f"{one}.npz", f"{one}.npz"]) == 0


def test_a_folder_of_several_products_cannot_be_fitted_at_once(
    sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--data", str(sample_data), "--out", str(tmp_path / "x")]) == 1
    assert "give the folder of one of them" in capsys.readouterr().err


def test_settings_out_of_range_are_refused(
    sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    category = min(sample_data.iterdir())
    options = ["--out", str(tmp_path / "x"), "--smgs-weight", "2"]
    assert main(["fit", "--data", str(category), *options]) == 1
    assert "smgs_weight" in capsys.readouterr().err
