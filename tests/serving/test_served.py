import dataclasses

import pytest

from apt_ray.detection.calibration import calibrate
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import FleetError
from serving.replica.served import decide
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
