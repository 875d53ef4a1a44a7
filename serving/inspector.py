"""The replica: one backbone and one prompt set, inspecting images in batches.

Three kinds of threads: the event loop receives and answers, a pool decodes image files, and one
thread owns the model. Nothing on the way of an image asks the registry.
"""

import asyncio
import dataclasses
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from PIL import Image

from apt_ray.backbone import load_backbone
from apt_ray.calibration import Threshold, calibrate
from apt_ray.detector import Detector, Inspection
from apt_ray.errors import FleetError
from apt_ray.images import ImageLimits, decode_image
from apt_ray.prompt_set import PromptSet
from apt_ray.registry import RegisteredVersion, Registry
from serving import problems
from serving.batching import Batcher
from serving.messages import CategoryReport, InspectedImage
from serving.settings import Batching, Decision

# Decoding is memory-bound: more threads than this gain nothing and multiply the pixels in flight.
_DECODERS = 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """An image on its way to the model; times are of `time.monotonic`."""

    image: Image.Image
    queued_at: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Result:
    inspection: Inspection
    started_at: float
    ended_at: float


class Inspector:
    """Serves one category from memory.

    Args:
        detector: what inspects.
        registered: the registry's version that the detector's prompt set is.
        limits: of an image.
        batching: threads, batches and queue.
    """

    def __init__(
        self,
        detector: Detector,
        registered: RegisteredVersion,
        *,
        limits: ImageLimits,
        batching: Batching,
    ) -> None:
        self._detector = detector
        self._limits = limits
        self._max_queue = batching.max_queue
        self._about = _describe(detector, registered)
        self._waiting = 0
        self._decoders = ThreadPoolExecutor(_DECODERS, "decode")
        # Ray gives a replica one OpenMP thread whatever its num_cpus; the setting decides instead.
        self._model = ThreadPoolExecutor(
            1, "model", initializer=torch.set_num_threads, initargs=(batching.threads,)
        )
        self._batcher = Batcher(
            self._run, executor=self._model, max_batch_size=batching.max_batch_size
        )
        self._self_test()

    @classmethod
    def load(
        cls,
        category: str,
        reference: str,
        *,
        tracking_uri: str,
        decision: Decision,
        device: Literal["cpu", "cuda"],
        limits: ImageLimits,
        batching: Batching,
    ) -> "Inspector":
        """The inspector of a category's version in the registry.

        Raises RegistryError, PromptSetError or BackboneError if it cannot be loaded, FleetError if
        the decision asks for what the version's calibration cannot give.
        """
        prompt_set, registered = Registry(tracking_uri).load(category, reference)
        backbone = load_backbone(prompt_set.backbone, device=device)
        detector = Detector(backbone, decide(prompt_set, decision))
        return cls(detector, registered, limits=limits, batching=batching)

    async def describe(self, category: str) -> CategoryReport:
        """What answers here; `category` is the one that the route prefix led here."""
        return self._about

    async def inspect(self, category: str, data: bytes) -> InspectedImage:
        """Inspect an image file.

        Raises ImageError if it is no acceptable image, ProblemError if too many are waiting.
        """
        if self._waiting >= self._max_queue:
            raise problems.overloaded(
                f"{self._waiting} images are waiting for this replica already"
            )
        self._waiting += 1
        try:
            received_at = time.monotonic()
            image = await asyncio.get_running_loop().run_in_executor(
                self._decoders, lambda: decode_image(data, limits=self._limits)
            )
            job = _Job(image=image, queued_at=time.monotonic())
            result = await self._batcher.submit(job)
        finally:
            self._waiting -= 1
        return InspectedImage(
            about=self._about,
            image=image,
            inspection=result.inspection,
            decode_ms=1000 * (job.queued_at - received_at),
            queue_ms=1000 * (result.started_at - job.queued_at),
            inspect_ms=1000 * (result.ended_at - result.started_at),
        )

    def _run(self, jobs: list[_Job]) -> list[_Result]:
        started_at = time.monotonic()
        with torch.inference_mode():
            inspections = self._detector.inspect([job.image for job in jobs])
        ended_at = time.monotonic()
        return [
            _Result(inspection=inspection, started_at=started_at, ended_at=ended_at)
            for inspection in inspections
        ]

    def _self_test(self) -> None:
        """One inspection before the first request: it fails early, and warms up what is lazy."""
        size = self._detector.backbone.input_size
        job = _Job(image=Image.new("RGB", (size, size), "gray"), queued_at=time.monotonic())
        [result] = self._model.submit(self._run, [job]).result()
        if not math.isfinite(result.inspection.anomaly_score):
            raise FleetError(
                f"version {self._about.version} of {self._about.category} scores a gray image"
                f" {result.inspection.anomaly_score}: it is damaged; fit the category again"
            )


def decide(prompt_set: PromptSet, decision: Decision) -> PromptSet:
    """The prompt set with the fleet file's threshold in place of its own, if it gives one."""
    threshold = prompt_set.threshold
    if decision.threshold is not None:
        threshold = threshold.model_copy(
            update={"value": decision.threshold, "certified_false_alarm_rate": None}
        )
    elif decision.false_alarm_rate is not None:
        threshold = _recalibrate(prompt_set, decision.false_alarm_rate)
    provenance = prompt_set.provenance.model_copy(update={"threshold": threshold})
    return dataclasses.replace(prompt_set, provenance=provenance)


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
        " needed; fit it again with more good images, or give a threshold in the fleet file"
    )


def _describe(detector: Detector, registered: RegisteredVersion) -> CategoryReport:
    prompt_set = detector.prompt_set
    return CategoryReport(
        category=prompt_set.category,
        version=registered.version,
        aliases=list(registered.aliases),
        run_id=registered.run_id,
        backbone=prompt_set.backbone.name,
        fingerprint=prompt_set.fingerprint,
        threshold=prompt_set.threshold.value,
        certified_false_alarm_rate=prompt_set.threshold.certified_false_alarm_rate,
        shots=prompt_set.provenance.shots,
        trained_at=prompt_set.provenance.created,
        settings=prompt_set.settings.model_dump(mode="json"),
        metrics=prompt_set.metrics,
    )
