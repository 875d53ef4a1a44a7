import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from apt_ray.config import FitSettings
from apt_ray.data.folders import find_categories
from apt_ray.data.samples.factory import write_samples
from apt_ray.detection.detector import Detector
from apt_ray.errors import DataError
from apt_ray.files import write_json
from apt_ray.images import read_image
from apt_ray.prompts.fit import fit
from benchmarks.heads import WAYS, defect_places
from benchmarks.metric_head import SERVED, Found, Plan, Scored, measure, report, values
from tests.fakes import FakeBackbone

PLAN = Plan(seeds=(0,), counts=(1, 2), tested=12, further=2)
SETTINGS = FitSettings(steps=2, reference_copies=1)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What is measured of one product."""
    root = tmp_path_factory.mktemp("products")
    write_samples(root, good=8, test_good=8, test_defective=32, size=96)
    category = find_categories(root)[0]
    backbone = FakeBackbone(patches=12)
    found = Found.read(None, PLAN)
    assert list(measure(category, backbone, found, SETTINGS)) == [0]
    # What is served is scored as a detector does.
    names = list(found.kinds[category.name])
    assert 8 < len(names) <= 20
    fitted = fit(category.name, category.support_set(4, 0), SETTINGS, backbone=backbone)
    images = [read_image(category.root / name) for name in names]
    scores_B = Detector(backbone, fitted).score(backbone.encode_images(backbone.preprocess(images)))
    served = next(each for each in found.scored if each.way == SERVED)
    assert served.scores == pytest.approx(scores_B[1].tolist(), abs=1e-5)
    assert served.threshold == pytest.approx(fitted.threshold.value, abs=1e-5)
    assert list(measure(category, backbone, found, SETTINGS)) == []
    return found


def test_every_way_is_asked_and_added_evidence_lowers_no_score(found: Found) -> None:
    served = np.array(next(each.scores for each in found.scored if each.way == SERVED))
    assert {each.way for each in found.scored} == {SERVED, *WAYS}
    for each in found.scored:
        if not each.way.startswith(("reweighted", "control: further")):
            assert (np.array(each.scores) >= served - 2e-6).all(), each.way
    raised = {each.way for each in found.scored if max(np.array(each.scores) - served) > 1e-3}
    assert {"log ratio", "left over", "near in look"} <= raised


def test_a_stopped_run_goes_on_where_it_was(found: Found, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    write_json(file, asdict(found))
    again = Found.read(file, PLAN)
    assert again == found
    with pytest.raises(DataError, match="another plan"):
        Found.read(file, Plan())
    file.write_text(json.dumps({"plan": {}}))
    with pytest.raises(DataError, match="give another --json FILE"):
        Found.read(file, PLAN)


def test_tables_hold_every_way_and_every_count(found: Found) -> None:
    text = report(found)
    assert text.count(f"| {SERVED} |") == 1
    for count in PLAN.counts:
        assert f"{count} confirmed, mean of all categories" in text
    for way in WAYS:
        cells = re.findall(rf"^\| {re.escape(way)} \|.* \|$", text, re.MULTILINE)
        assert len(cells) >= 4
        assert all("nan" not in cell for cell in cells)
    assert "| way | confirmed | image AUROC, same | image AUROC, other |" in text


def test_figures_are_those_counted_by_hand() -> None:
    is_bad_I = np.array([False] * 10 + [True] * 4)
    served = _scored([*range(10), 5.5, 7.5, 8.5, 20.0], threshold=7.5)
    way = _scored([*range(10), 5.5, 8.5, 9.5, 20.0], threshold=8.0)
    weight_RI = np.ones((2, 14))
    weight_RI[1, 9] = 0  # the highest good one is not drawn
    weight_RI[1, 0] = 2
    weight_RI[1, 13] = 0  # nor the surest defect
    weight_RI[1, 10] = 2
    figures = values(way, served, is_bad_I, weight_RI)
    assert figures["rejected"].tolist() == [0.1, 0.0]
    assert figures["found"].tolist() == [0.75, 0.5]
    # Served rejects 8 and 9, so the limit is 7, then 8, so it is 7 too.
    assert figures["equal"].tolist() == [0.75, 0.5]
    assert figures["at 5 %"].tolist() == [0.5, 0.5]  # none may be rejected: 9, then 8
    assert figures["at 10 %"].tolist() == [0.75, 0.5]  # one may: 8, then 7
    assert figures["image AUROC"][0] == pytest.approx((6 + 9 + 10 + 10) / 40)
    one_kind = values(way, served, is_bad_I, weight_RI * ([1] * 11 + [0] * 3))
    assert one_kind["image AUROC"][0] == pytest.approx(0.6)


def test_a_defect_is_where_its_map_is_high() -> None:
    map_SS = torch.zeros(8, 8)
    map_SS[2:4, 4:6] = 1
    map_SS[7, 0] = 0.9  # as high, and not connected
    assert defect_places(map_SS, 16).tolist() == [6]
    assert defect_places(map_SS, 4).tolist() == [1]


def _scored(scores: list[float], *, threshold: float) -> Scored:
    return Scored(
        category="part",
        seed=0,
        draw=0,
        of="all kinds",
        count=1,
        way="way",
        threshold=threshold,
        scores=scores,
    )
