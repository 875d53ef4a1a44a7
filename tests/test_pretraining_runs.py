"""How a pretraining run begins, what it leaves out and what it writes."""

import json
from pathlib import Path

import pytest
import torch

from apt_ray.errors import SettingsError
from apt_ray.models.builtin import load_builtin
from apt_ray.pretraining.settings import TrainSettings
from apt_ray.pretraining.train import Pretraining, train

TINY = TrainSettings(
    steps=2, batch_pairs=2, sizes={0.0: 32}, phrases=8, state_phrases=2, free_texts=2
)


def test_a_run_goes_on_from_the_shipped_weights() -> None:
    shipped = load_builtin().model.state_dict()
    run = Pretraining(TINY.model_copy(update={"start": "shipped"}))
    for name, tensor in run.trained_model().state_dict().items():
        assert torch.equal(tensor, shipped[name]), name
    run.step()
    moved = run.trained_model().state_dict()
    assert not torch.equal(moved["visual.proj"], shipped["visual.proj"])
    assert not torch.equal(moved["token_embedding.weight"], shipped["token_embedding.weight"])
    fresh = Pretraining(TINY).trained_model().state_dict()
    assert not torch.equal(fresh["visual.proj"], shipped["visual.proj"])


def test_kinds_that_are_left_out_are_never_drawn() -> None:
    run = Pretraining(TINY.model_copy(update={"left_out": ("rough", "wafer")}))
    names = run.surfaces
    assert "rough" not in names
    assert "wafer" not in names
    assert "wood" in names
    with pytest.raises(SettingsError, match="no kind of surface is called 'wafr'"):
        Pretraining(TINY.model_copy(update={"left_out": ("wafr",)}))


@pytest.mark.parametrize("sizes", [{0.5: 64}, {0.0: 60}, {0.0: 16}])
def test_sizes_begin_at_the_start_and_are_whole_patches(sizes: dict[float, int]) -> None:
    with pytest.raises(SettingsError, match="sizes need one"):
        TrainSettings(steps=1, sizes=sizes)


def test_training_keeps_the_curve(tmp_path: Path) -> None:
    lines: list[str] = []
    train(TINY, tmp_path / "run", report=lines.append)
    lines_of_curve = (tmp_path / "run" / "curve.jsonl").read_text().splitlines()
    curve = [json.loads(line) for line in lines_of_curve]
    assert curve[-1]["step"] == 2
    assert curve[-1]["progress"] == 1
    assert {"dense", "reference", "pooled", "phrases"} <= curve[-1].keys()
    assert "step 2" in lines[-1]
