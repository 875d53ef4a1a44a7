import json
from pathlib import Path

import pytest

from apt_ray.cli.main import main
from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.images import read_image


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
    assert main([*arguments, *switches.split()]) == 0
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
    reference = [d for d in differences if d["variant"] == "reference"]
    assert all(d["low"] == d["high"] == 0 for d in reference), "steps do not change the memory"


def test_evaluate_prints_a_table_and_writes_every_result(
    sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    name = min(sample_data.iterdir()).name
    options = ["--categories", name, "--shots", "1", "--seeds", "0", "--steps", "1"]
    options += ["--calibrate", "1", "--json", str(file)]
    assert main(["evaluate", "--data", str(sample_data), *options]) == 0
    assert "| image AUROC |" in capsys.readouterr().out
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
        "good_rejected",
        "good_rejected_interval",
        "defects_found",
        "defects_found_interval",
        "defects_found_by_type",
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
