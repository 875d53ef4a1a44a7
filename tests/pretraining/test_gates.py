import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from apt_ray.anomalies.bank import SupportBank
from apt_ray.config import BACKBONE, BackboneSpec
from apt_ray.detection.rule import anomalous_probability
from apt_ray.features.clip import FrozenCLIP, load_backbone
from apt_ray.pretraining.gates import (
    LearnedFigures,
    Report,
    format_report,
    main,
    measure_backbone,
    train_free_direction,
)
from apt_ray.pretraining.generator import generate


@pytest.fixture(scope="module", name="report")
def _report() -> Report:
    backbone = load_backbone(BackboneSpec(reference_encoder=BACKBONE))
    return measure_backbone(backbone, pairs=12, products=1, test_pairs=6, surfaces=("marble",))


def test_every_group_of_kinds_and_every_product_is_measured(report: Report) -> None:
    assert [(kind.surfaces, kind.defects) for kind in report.kinds] == [
        ("seen", "seen"),
        ("seen", "held out"),
        ("held out", "seen"),
        ("held out", "held out"),
    ]
    for kind in report.kinds:
        assert set(kind.pixel_auroc) == {"prompts", "reference", "both"}
        assert kind.pixel_auroc["reference"] > 0.6
    (marble,) = report.learned
    assert marble.learned > 0.5
    assert marble.free > 0.5
    assert "| marble |" in format_report(report)


def test_a_gate_fails_where_its_figure_does(report: Report) -> None:
    def gates(participation_ratio: float, **learned: float) -> list[bool]:
        figures = LearnedFigures(surface="marble", seed=0, **learned)
        changed = replace(report, learned=(figures,), participation_ratio=participation_ratio)
        return list(changed.gates().values())[1:]

    assert gates(20.0, hand_written=0.8, learned=0.85, free=0.86) == [True, True, True]
    assert gates(9.0, hand_written=0.9, learned=0.85, free=0.88) == [False, False, False]


def test_a_free_direction_learns_its_bank(backbone: FrozenCLIP, bank: SupportBank) -> None:
    text_PE = train_free_direction(backbone, bank, strength=0.3, rate=0.03, seed=0)
    torch.testing.assert_close(text_PE.norm(dim=1), torch.ones(2))
    tokens, labels = bank.noisy_SDNE[0.3].float(), bank.noisy_labels_SDN
    p = anomalous_probability(tokens, text_PE, backbone.constants)
    assert p[labels == 1].mean() > p[labels == 0].mean() + 0.1


def test_pairs_of_one_product_share_kind_and_style_but_not_pose() -> None:
    product = torch.arange(12).repeat_interleave(6)
    pairs = generate(torch.arange(72), size=64, defect_rate=0.0, product_seeds_P=product)
    kinds = pairs.attributes_PA[:, 0].unflatten(0, (12, 6))
    assert torch.equal(kinds, kinds[:, :1].expand(-1, 6))
    assert len(kinds[:, 0].unique()) > 4
    colours = pairs.query_P3HW.mean((2, 3)).unflatten(0, (12, 6))
    assert colours.std(1).mean() < 0.5 * colours.mean(1).std(0).mean()
    assert not torch.equal(pairs.query_P3HW[0], pairs.query_P3HW[1])


def test_the_command_writes_what_it_measured(tmp_path: Path) -> None:
    file = tmp_path / "gates.json"
    with pytest.raises(SystemExit):
        main(["--pairs", "x"])
    few = ["--pairs", "8", "--products", "1", "--test-pairs", "4", "--surfaces", "nut"]
    main([*few, "--json", str(file)])
    written = json.loads(file.read_text())
    assert len(written["gates"]) == 4
    assert len(written["kinds"]) == 4
