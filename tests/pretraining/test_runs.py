"""How a pretraining run begins, what it leaves out and what it writes."""

import json
import math
from pathlib import Path

import pytest
import torch

from apt_ray.errors import SettingsError
from apt_ray.features.builtin.apt_mini import load_builtin
from apt_ray.pretraining.__main__ import export
from apt_ray.pretraining.generator import generate
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


def test_steps_drawn_at_once_get_the_pairs_that_they_would_have_got_alone() -> None:
    seeds = torch.arange(6)
    together = generate(seeds, size=32).split(4)
    assert [len(part.mask_PHW) for part in together] == [4, 2]
    alone = generate(seeds[4:], size=32)
    torch.testing.assert_close(together[1].query_P3HW, alone.query_P3HW, atol=1e-3, rtol=0)
    assert torch.equal(together[1].attributes_PA, alone.attributes_PA)


@pytest.mark.slow
def test_pictures_may_be_larger_than_the_model() -> None:
    run = Pretraining(TINY.model_copy(update={"sizes": {0.0: 160}}))
    assert all(math.isfinite(value) for value in run.step().values())


def test_weights_are_written_before_they_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(TINY, tmp_path, report=lambda line: None)

    def out_of_time(*_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr("apt_ray.pretraining.__main__.measure", out_of_time)
    with pytest.raises(TimeoutError):
        export(run, tmp_path, pairs=8)
    load_builtin(tmp_path)
