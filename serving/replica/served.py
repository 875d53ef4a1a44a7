"""One category as a replica serves it: the detector of one version, tested before it serves."""

import math
from dataclasses import dataclass

from apt_ray.detection.calibration import Threshold, calibrate
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import FleetError
from apt_ray.features.protocol import Backbone
from apt_ray.video.part import PartView
from serving.api.messages import CategoryReport
from serving.controller.orders import Order
from serving.settings import Decision, ThresholdSource

# What other processors, threads and batch sizes may change in a score. Damage of the text features
# changes it by more; of the memory, not always.
_PROBE_TOLERANCE = 0.01
# Enough for a histogram, and a few kilobytes of an answer.
_MOST_SCORES = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedCategory:
    """A version of a category, ready to inspect.

    Attributes:
        order: what it was built for.
        detector: inspects, by the fleet file's decision.
        about: what callers are told.
    """

    order: Order
    detector: Detector
    about: CategoryReport


def build(
    prompt_set: PromptSet,
    order: Order,
    backbone: Backbone,
    *,
    version: int,
    run_id: str,
    part: PartView | None = None,
) -> ServedCategory:
    """The category as ordered; `part` is what its support images show.

    Raises PromptSetError if the prompt set is another backbone's or its region of interest rules
    out that any part is rejected, FleetError if the decision asks
    for what the version's calibration cannot give.
    """
    decided = decide(prompt_set, order.decision)
    interest = order.region_of_interest
    source: ThresholdSource = "operator" if order.by_operator else "fleet file"
    detector = Detector(
        backbone, decided, region_of_interest=None if interest is None else interest.mask_HW
    )
    about = _describe(
        decided,
        version,
        run_id,
        threshold_source="prompt set" if order.decision == Decision() else source,
        counted_share=interest.share if interest else 1.0,
        part=part,
    )
    return ServedCategory(order=order, detector=detector, about=about)


def self_test(served: ServedCategory, prompt_set: PromptSet) -> None:
    """FleetError if a fixed image does not score as it did when the prompt set was fitted."""
    plain = Detector(served.detector.backbone, prompt_set)  # a region of interest changes scores
    score = plain.probe_score()
    expected = prompt_set.provenance.probe_score
    name = f"version {served.order.version} of {prompt_set.category}"
    if not math.isfinite(score):
        raise FleetError(f"{name} scores an image {score}: it is damaged; fit the category again")
    if expected is not None and abs(score - expected) > _PROBE_TOLERANCE:
        raise FleetError(
            f"{name} scores its test image {score:.4f}, not {expected:.4f} as when it was fitted:"
            " the prompt set or the backbone is damaged; fit the category again"
        )


def decide(prompt_set: PromptSet, decision: Decision) -> PromptSet:
    """The prompt set with the fleet file's threshold in place of its own, if it gives one."""
    threshold = prompt_set.threshold
    if decision.threshold is not None:
        threshold = threshold.moved_to(decision.threshold)
    elif decision.false_alarm_rate is not None:
        threshold = _recalibrate(prompt_set, decision.false_alarm_rate)
    return prompt_set.with_threshold(threshold)


def _recalibrate(prompt_set: PromptSet, false_alarm_rate: float) -> Threshold:
    threshold = prompt_set.threshold
    if threshold.source == "calibration images":
        recalibrated = calibrate(threshold.scores, false_alarm_rate)
        if recalibrated.certified:
            return recalibrated
        found = f"only {len(threshold.scores)}"
    else:
        found = "no"
    raise FleetError(
        f"{prompt_set.category} cannot be held to a false-alarm rate of {false_alarm_rate:g}: its"
        f" prompt set has {found} calibration images, {math.ceil(1 / false_alarm_rate) - 1} are"
        " needed; fit it again with more normal images, or give a threshold in the fleet file"
    )


def _describe(
    prompt_set: PromptSet,
    version: int,
    run_id: str,
    *,
    threshold_source: ThresholdSource,
    counted_share: float,
    part: PartView | None,
) -> CategoryReport:
    threshold = prompt_set.threshold
    return CategoryReport(
        category=prompt_set.category,
        version=version,
        run_id=run_id,
        backbone=prompt_set.backbone.name,
        fingerprint=prompt_set.fingerprint,
        threshold=threshold.value,
        threshold_source=threshold_source,
        certified_false_alarm_rate=threshold.certified_false_alarm_rate,
        normal_scores=_thinned(sorted(threshold.scores)),
        normal_scores_of=threshold.source,
        counted_share=counted_share,
        part=part,
        shots=prompt_set.provenance.shots,
        trained_at=prompt_set.provenance.created,
        settings=prompt_set.settings.model_dump(mode="json"),
        metrics=prompt_set.metrics,
        feedback=[each.id for each in prompt_set.provenance.feedback],
    )


def _thinned(ordered: list[float]) -> list[float]:
    """At most `_MOST_SCORES` of them, evenly taken, the lowest and the highest among them."""
    last, steps = len(ordered) - 1, _MOST_SCORES - 1
    if last <= steps:
        return ordered
    return [ordered[step * last // steps] for step in range(_MOST_SCORES)]
