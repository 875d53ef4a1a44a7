import dataclasses

import pytest

from apt_ray.detection.calibration import calibrate
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import FleetError
from apt_ray.features.clip import FrozenCLIP
from serving.api.messages import CategoryReport
from serving.controller.orders import Order
from serving.replica.served import build, decide
from serving.settings import Decision


def test_the_fleet_files_decision_replaces_the_threshold(prompt_set: PromptSet) -> None:
    assert decide(prompt_set, Decision()).threshold == prompt_set.threshold
    fixed = decide(prompt_set, Decision(threshold=0.25)).threshold
    assert (fixed.value, fixed.certified) == (0.25, False)
    with pytest.raises(FleetError, match="no calibration images, 19 are needed"):
        decide(prompt_set, Decision(false_alarm_rate=0.05))

    scores = [score / 100 for score in range(1, 20)]
    provenance = prompt_set.provenance.model_copy(update={"threshold": calibrate(scores, 0.5)})
    calibrated = dataclasses.replace(prompt_set, provenance=provenance)
    strict = decide(calibrated, Decision(false_alarm_rate=0.05)).threshold
    assert strict == calibrate(scores, 0.05)
    with pytest.raises(FleetError, match="only 19 calibration images, 99 are needed"):
        decide(calibrated, Decision(false_alarm_rate=0.01))


def test_a_category_says_whose_threshold_it_has_and_what_good_parts_score(
    backbone: FrozenCLIP, prompt_set: PromptSet
) -> None:
    def about(decided: PromptSet, decision: Decision) -> CategoryReport:
        order = Order(version=1, decision=decision)
        return build(decided, order, backbone, version=1, run_id="").about

    own = about(prompt_set, Decision())
    assert own.threshold_source == "prompt set"
    assert own.normal_scores == sorted(prompt_set.threshold.scores)
    assert own.normal_scores_of == "left-out support images"
    fixed = about(prompt_set, Decision(threshold=0.25))
    assert (fixed.threshold, fixed.threshold_source) == (0.25, "fleet file")
    assert fixed.normal_scores == own.normal_scores

    scores = [score / 2000 for score in range(1999, 0, -1)]
    provenance = prompt_set.provenance.model_copy(update={"threshold": calibrate(scores, 0.1)})
    many = about(dataclasses.replace(prompt_set, provenance=provenance), Decision())
    assert many.normal_scores_of == "calibration images"
    assert len(many.normal_scores) == 500
    assert (many.normal_scores[0], many.normal_scores[-1]) == (scores[-1], scores[0])
    steps = [b - a for a, b in zip(many.normal_scores, many.normal_scores[1:], strict=False)]
    assert 0.0014 < min(steps) <= max(steps) < 0.0026
    strict = about(
        dataclasses.replace(prompt_set, provenance=provenance), Decision(false_alarm_rate=0.01)
    )
    assert strict.threshold_source == "fleet file"
