"""The replica's engine: backbones, prompt sets of many categories, images inspected in batches.

Four kinds of threads: the event loop receives and answers, a pool decodes and resizes image files
and draws images, one thread owns the model, and loaders (see `follower`) bring new versions. A
new version replaces the old one between two batches. Nothing on the way of an image asks the
registry or waits for a lock.
"""

import asyncio
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol
from weakref import WeakMethod, WeakValueDictionary

import torch
from PIL import Image

from apt_ray.config import BackboneSpec
from apt_ray.detection.detector import Inspection, Region
from apt_ray.detection.drift import Appearance, appearance_of
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import ImageError
from apt_ray.features.clip import FrozenCLIP, load_backbone
from apt_ray.features.protocol import Backbone, ImageFeatures
from apt_ray.images import ImageLimits, decode_image, draw_overlay, encode_png
from apt_ray.video.part import PartView
from serving.api import problems
from serving.api.history import KeptCandidate
from serving.api.messages import (
    CategoryReport,
    Explanation,
    Inspected,
    InspectionReport,
    InspectionRequest,
    RegionReport,
    Timings,
)
from serving.api.problems import ProblemError
from serving.controller.activity import Counts
from serving.controller.drift import DriftReport, DriftReset
from serving.controller.orders import Order, StoredVersion
from serving.controller.shadow import ShadowOrder, ShadowReport
from serving.replica.admission import Admission
from serving.replica.batching import Batcher
from serving.replica.beside import Beside
from serving.replica.drift import DriftWatches
from serving.replica.explain import Look, Supports, explanation
from serving.replica.history import History
from serving.replica.last_hour import LastHour
from serving.replica.meter import Meter
from serving.replica.pictures import bounded, gray_png
from serving.replica.served import ServedCategory, build, self_test
from serving.replica.shadow import Answered, Shadow
from serving.runtime import choose_runtime
from serving.settings import Batching

# Decoding is memory-bound: more threads than this gain nothing and multiply the pixels in flight.
_DECODERS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """An image on its way to the model.

    Attributes:
        served: the version that it was decoded for.
        follows: whether a version that takes over meanwhile answers in its place.
        size: of the image sent, (width, height).
        drawn_size: of the picture of it that is drawn.
        ground: the image at that size, if the map is to be drawn over it.
        queued_at: of `time.monotonic`.
        appearance: of the whole image, where drift is watched for.
        is_tried: whether a candidate is tried on it afterwards.
    """

    served: ServedCategory
    follows: bool
    pixels_1CHW: torch.Tensor
    size: tuple[int, int]
    drawn_size: tuple[int, int]
    ground: Image.Image | None
    queued_at: float
    appearance: Appearance | None
    is_tried: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Result:
    served: ServedCategory
    map_SS: torch.Tensor
    score: float
    features_W: torch.Tensor
    kinds: dict[str, float]
    encoded: tuple[ImageFeatures, int] | None  # a batch's and its row, for who is tried afterwards
    started_at: float
    ended_at: float

    @property
    def is_anomalous(self) -> bool:
        return self.served.detector.prompt_set.threshold.rejects(self.score)


class Load(Protocol):
    """Loads a backbone; raises as `load_backbone`."""

    def __call__(self, spec: BackboneSpec, *, device: str) -> FrozenCLIP: ...


class Inspector:
    """Serves the categories of one pool from memory.

    Args:
        limits: of an image.
        batching: threads, batches and queues.
        device: where the backbones run.
        shared: whether several categories share the replica.
        meter: counts; None where nothing does.
        beside: has versions beside those that serve, which are asked or tried; None where there are
            no others.
        history: keeps what was inspected; None where nothing does.
        drift: watches what was inspected; None where nothing does.
        load: loads the backbones; what a process has loaded already need not be loaded again.
    """

    def __init__(
        self,
        *,
        limits: ImageLimits,
        batching: Batching,
        device: Literal["cpu", "cuda"] = "cpu",
        shared: bool = False,
        meter: Meter | None = None,
        beside: Beside | None = None,
        history: History | None = None,
        drift: DriftWatches | None = None,
        load: Load = load_backbone,
    ) -> None:
        self._limits = limits
        self._beside = beside
        self._device = device
        self._batching = batching
        self._meter = meter
        self._history = history
        self._drift = drift
        self._load = load
        self._served: dict[str, ServedCategory] = {}
        self._backbones: WeakValueDictionary[str, Backbone] = WeakValueDictionary()
        self._last_hour = LastHour()
        self._supports = Supports()
        self._costs_s: dict[str, float] = {}
        self._loading = threading.Lock()
        self._admission = Admission(
            max_wait_s=batching.max_wait_s, shared=shared, decoders=_DECODERS, meter=meter
        )
        self._decoders = ThreadPoolExecutor(
            _DECODERS, "decode", initializer=torch.set_num_threads, initargs=(1,)
        )
        # Ray gives a replica one OpenMP thread whatever its num_cpus; the setting decides instead.
        self._model = ThreadPoolExecutor(
            1, "model", initializer=torch.set_num_threads, initargs=(batching.threads,)
        )
        # A CPU's thread is filled by one image, and more of them no longer fit its cache.
        largest = batching.max_batch_size if device == "cuda" else batching.threads
        self._batcher: Batcher[_Job, _Result] = Batcher(
            _lent(self._run),
            executor=self._model,
            max_batch_size=min(batching.max_batch_size, largest),
        )
        self._shadow: Shadow | None = None
        if beside is not None:
            self._shadow = Shadow(
                beside,
                prepare=_lent(self._prepare),
                when_idle=self._batcher.when_idle,
                pixels=_lent(self._pixels),
                meter=meter,
            )

    def load(self, category: str, order: Order, stored: StoredVersion) -> None:
        """Serve a version from now on; blocks while it is read and tested.

        Raises PromptSetError or BackboneError if it cannot be loaded, FleetError if it fails its
        test or cannot decide as ordered; then what was served before still is.
        """
        served = self._prepare(category, order, stored)
        backbone, before = served.detector.backbone, self._served.get(category)
        if before is None or before.detector.backbone is not backbone:
            self._admission.expect(category, self._cost_s(backbone))
        self._served[category] = served

    def _prepare(self, category: str, order: Order, stored: StoredVersion) -> ServedCategory:
        """A version that is read and tested; raises as `load`."""
        try:
            source = f"version {stored.version} of {category}"
            whole = PromptSet.from_bytes(stored.data, source=source)
            # Thumbnails of a thousand categories are fetched when somebody looks at them.
            prompt_set = replace(whole, thumbnails=())
            served = build(
                prompt_set,
                order,
                self._backbone(prompt_set),
                version=stored.version,
                run_id=stored.run_id,
                part=PartView.of([decode_image(data) for data in whole.thumbnails]),
            )
            self._model.submit(self_test, served, prompt_set).result()
        except Exception:
            if self._meter:
                self._meter.loaded(category, stored.version, succeeded=False)
            raise
        if self._meter:
            self._meter.loaded(category, stored.version, succeeded=True)
        return served

    def drop(self, category: str) -> None:
        """Serve a category no more; images of it that wait already are still inspected."""
        self._served.pop(category, None)
        if self._drift:
            self._drift.forget(category)

    def serves(self) -> dict[str, Order]:
        """What is served, by category."""
        return {category: served.order for category, served in self._served.items()}

    def thresholds(self) -> dict[str, float]:
        """The scores above which parts are anomalous, by category."""
        return {category: served.about.threshold for category, served in self._served.items()}

    def last_hour(self) -> dict[str, Counts]:
        """What the images of the last hour came to, by category."""
        return self._last_hour.counts()

    def drift(self) -> dict[str, DriftReport]:
        """Whether images and scores are still what they were, by category with traffic."""
        return self._drift.reports() if self._drift else {}

    def reset_drift(self, resets: Mapping[str, DriftReset]) -> None:
        """Take back the alarms of categories, once for each reset."""
        if self._drift:
            self._drift.reset(resets)

    def follow_candidates(self, orders: Mapping[str, ShadowOrder]) -> None:
        """Try these candidates from now on; to be called where requests are answered."""
        if self._shadow:
            self._shadow.follow(orders)

    def shadows(self) -> dict[str, ShadowReport]:
        """What the candidates make of the images, by category that has one and traffic."""
        return self._shadow.reports() if self._shadow else {}

    async def describe(self, category: str) -> CategoryReport:
        return self._find(category).about

    async def inspect(self, category: str, data: bytes, asked: InspectionRequest) -> Inspected:
        """Inspect an image file; see `Service.inspect`."""
        loop = asyncio.get_running_loop()
        try:
            served = self._find(category)
            if asked.alias is not None:
                if self._beside is None:
                    raise problems.no_version(category, asked.alias)
                served = await self._beside.find(asked.alias, served, self._prepare)
            received_at = time.monotonic()
            with self._admission.admitted(category, len(data), asked.timeout_s):
                job = await loop.run_in_executor(self._decoders, self._decode, served, data, asked)
                result = await self._batcher.submit(category, job)
                conclude = partial(self._conclude, job, result, asked, received_at)
                if asked.picture is None and not result.is_anomalous:
                    inspected = conclude()  # no map at the size of the image
                else:
                    inspected = await loop.run_in_executor(self._decoders, conclude)
            if asked.alias is None:
                self._last_hour.add(
                    category,
                    score=inspected.report.anomaly_score,
                    is_anomalous=inspected.report.is_anomalous,
                    ms=1000 * (time.monotonic() - received_at),
                )
                # Frames of a stream are no parts of their own: they would crowd out what is kept.
                if not asked.is_frame:
                    self._look_back(job, result, inspected.report, asked.id, data)
            return inspected
        except (ImageError, ProblemError) as error:
            if self._meter:
                problem = error if isinstance(error, ProblemError) else problems.of_image(error)
                self._meter.refused(category, problem.problem.type.rpartition(":")[2])
            raise

    def _look_back(
        self, job: _Job, result: _Result, report: InspectionReport, request_id: str, data: bytes
    ) -> None:
        """What follows an answer, for which nobody waits."""
        served = result.served
        # What an older version answered says nothing of the one that serves now.
        is_current = self._served.get(report.category) is served
        if self._drift and job.appearance and is_current:
            self._drift.add(
                served,
                score=result.score,
                appearance=job.appearance,
                features_W=result.features_W.numpy(),
            )

        def keep(candidate: KeptCandidate | None) -> None:
            if self._history:
                self._history.keep(
                    report,
                    request_id=request_id,
                    data=data,
                    limits=self._limits,
                    reading=served.detector.prompt_set.reading,
                    map_SS=result.map_SS,
                    candidate=candidate,
                )

        if self._shadow and result.encoded and is_current:
            features, row = result.encoded
            answered = Answered(
                champion=served, score=result.score, features=features, row=row, data=data
            )
            self._shadow.try_on(answered, keep)
        else:
            keep(None)

    async def explain(self, category: str, data: bytes, asked: InspectionRequest) -> Explanation:
        """Say what the verdict on an image rests on; see `Service.explain`."""
        loop = asyncio.get_running_loop()
        served = self._find(category)
        with self._admission.admitted(category, len(data), asked.timeout_s):
            image = await loop.run_in_executor(
                self._decoders,
                partial(
                    decode_image,
                    data,
                    limits=self._limits,
                    reading=served.detector.prompt_set.reading,
                ),
            )
            look = await loop.run_in_executor(self._model, Look.at, served.detector, image)
            support = await self._supports.of(served, self._beside, self._model)
            return await loop.run_in_executor(
                self._decoders, explanation, served.about, served.detector, image, look, support
            )

    def _find(self, category: str) -> ServedCategory:
        try:
            return self._served[category]
        except KeyError:
            raise problems.not_ready(category) from None

    def _decode(self, served: ServedCategory, data: bytes, asked: InspectionRequest) -> _Job:
        started_at = time.monotonic()
        try:
            image = decode_image(
                data, limits=self._limits, reading=served.detector.prompt_set.reading
            )
            pixels_1CHW = served.detector.backbone.preprocess([image])
            drawn_size = bounded(image.size, asked.picture_side)
            ground = None
            if asked.picture == "overlay":
                ground = image if drawn_size == image.size else _reduced(image, drawn_size)
            appearance = None
            if self._drift and asked.alias is None and not asked.is_frame:
                appearance = appearance_of(pixels_1CHW[0].numpy())
            is_tried = (
                self._shadow is not None
                and asked.alias is None
                and not asked.is_frame
                and self._shadow.chooses(served.about.category, asked.id)
            )
        finally:
            ended_at = time.monotonic()
            self._admission.took(served.about.category, "decode", ended_at - started_at)
        return _Job(
            served=served,
            follows=asked.alias is None,
            pixels_1CHW=pixels_1CHW,
            size=image.size,
            drawn_size=drawn_size,
            ground=ground,
            queued_at=ended_at,
            appearance=appearance,
            is_tried=is_tried,
        )

    def _pixels(self, served: ServedCategory, data: bytes) -> torch.Tensor:
        """An image file as a version wants it; raises ImageError."""
        reading = served.detector.prompt_set.reading
        image = decode_image(data, limits=self._limits, reading=reading)
        return served.detector.backbone.preprocess([image])

    @torch.inference_mode()
    def _run(self, jobs: list[_Job]) -> list[_Result | Exception]:
        """One forward pass for all categories, then a score for each."""
        started_at = time.monotonic()
        groups: dict[int, list[int]] = defaultdict(list)
        # A version that came while the image waited is the one that answers.
        now = [self._newest(job) for job in jobs]
        for index, served in enumerate(now):
            groups[id(served.detector.backbone)].append(index)
        unknown: dict[str, float] = {}
        found = [(torch.empty(0), math.nan, torch.empty(0), unknown)] * len(jobs)
        encoded: list[tuple[ImageFeatures, int] | None] = [None] * len(jobs)
        for indices in groups.values():
            group_started_at = time.monotonic()
            backbone = now[indices[0]].detector.backbone
            features = backbone.encode_images(torch.cat([jobs[i].pixels_1CHW for i in indices]))
            whole_BW = features.whole_BW.cpu() if self._drift else torch.empty(len(indices), 0)
            rows: dict[int, list[int]] = defaultdict(list)
            for row, index in enumerate(indices):
                rows[id(now[index])].append(row)
                if jobs[index].is_tried:
                    encoded[index] = features, row
            for some in rows.values():
                detector = now[indices[some[0]]].detector
                own = features if len(some) == len(indices) else features[some]
                maps_BSS, scores_B = detector.score(own)
                scores = scores_B.tolist()
                named = detector.name_kinds(own, maps_BSS, scores)
                for row, map_SS, score, kinds in zip(
                    some, maps_BSS.cpu(), scores, named, strict=True
                ):
                    found[indices[row]] = (map_SS, score, whole_BW[row], kinds)
            each = (time.monotonic() - group_started_at) / len(indices)
            for category in {now[index].about.category for index in indices}:
                self._admission.took(category, "model", each)
        ended_at = time.monotonic()
        if self._meter:
            self._meter.batch(len(jobs))
        return [
            _Result(
                served=served,
                map_SS=map_SS,
                score=score,
                features_W=whole_W,
                kinds=kinds,
                encoded=batch_row,
                started_at=started_at,
                ended_at=ended_at,
            )
            for served, (map_SS, score, whole_W, kinds), batch_row in zip(
                now, found, encoded, strict=True
            )
        ]

    def _newest(self, job: _Job) -> ServedCategory:
        if not job.follows:
            return job.served
        newest = self._served.get(job.served.about.category, job.served)
        # Pixels were made for the size that the old version's backbone sees, by its reading.
        now, then = newest.detector, job.served.detector
        same = now.backbone is then.backbone and now.prompt_set.reading == then.prompt_set.reading
        return newest if same else job.served

    def _conclude(
        self, job: _Job, result: _Result, asked: InspectionRequest, received_at: float
    ) -> Inspected:
        started_at = time.monotonic()
        about, threshold = result.served.about, result.served.detector.prompt_set.threshold
        regions: Sequence[Region] = ()
        drawn: bytes | None = None
        if asked.picture is not None or result.is_anomalous:
            found = result.served.detector.conclude(
                result.map_SS, result.score, job.size, map_size=job.drawn_size
            )
            regions = found.regions
            if asked.picture is not None:
                drawn = _draw(found, job.ground)
        timings = Timings(
            receive=0.0,
            decode=round(1000 * (job.queued_at - received_at), 2),
            queue=round(1000 * (result.started_at - job.queued_at), 2),
            inspect=round(1000 * (result.ended_at - result.started_at), 2),
            conclude=round(1000 * (time.monotonic() - result.ended_at), 2),
        )
        report = InspectionReport(
            category=about.category,
            version=about.version,
            backbone=about.backbone,
            anomaly_score=result.score,
            threshold=threshold.value,
            is_anomalous=result.is_anomalous,
            p_value=threshold.p_value(result.score),
            certified_false_alarm_rate=about.certified_false_alarm_rate,
            regions=[RegionReport(**asdict(region)) for region in regions],
            kinds=result.kinds,
            width=job.size[0],
            height=job.size[1],
            timings_ms=timings,
        )
        if self._meter:
            self._meter.inspected(
                about.category,
                about.version,
                score=report.anomaly_score,
                is_anomalous=report.is_anomalous,
                ms=timings.model_dump(exclude={"receive"}),
            )
        self._admission.took(about.category, "conclude", time.monotonic() - started_at)
        return Inspected(report=report, picture_png=drawn)

    def _cost_s(self, backbone: Backbone) -> float:
        """Seconds of a backbone's pass over one image, measured once.

        It has been used before, by a self-test: the first pass also prepares for all later ones.
        """
        with self._loading:
            if backbone.fingerprint not in self._costs_s:
                self._costs_s[backbone.fingerprint] = self._model.submit(_pass_s, backbone).result()
            return self._costs_s[backbone.fingerprint]

    def _backbone(self, prompt_set: PromptSet) -> Backbone:
        """The backbone of a prompt set, which all categories that were fitted to it share."""
        with self._loading:
            backbone = self._backbones.get(prompt_set.fingerprint)
            if backbone is None:
                backbone = self._loaded(prompt_set.backbone)
                self._backbones[backbone.fingerprint] = backbone
            return backbone

    def _loaded(self, spec: BackboneSpec) -> FrozenCLIP:
        backbone = self._load(spec, device=self._device)
        choose_runtime(backbone, self._batching.runtime, threads=self._batching.threads)
        return backbone


def _lent(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method for a part of its object, which does not hold the object by it.

    Else the two would hold each other, with hundreds of megabytes, until garbage is collected.
    """
    held = WeakMethod(method)

    def call(*arguments: Any) -> Any:
        lent = held()
        assert lent is not None
        return lent(*arguments)

    return call


@torch.inference_mode()
def _pass_s(backbone: Backbone) -> float:
    pixels_1CHW = backbone.preprocess([Image.new("RGB", (1, 1))])
    started_at = time.monotonic()
    _ = backbone.encode_images(pixels_1CHW).cls_BE.cpu()  # a GPU has done its work by then
    return time.monotonic() - started_at


def _reduced(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)


def _draw(inspection: Inspection, ground: Image.Image | None) -> bytes:
    """The map, or the overlay where there is an image to lay it on."""
    if ground is None:
        return gray_png(inspection.anomaly_map, bits=16)
    return encode_png(draw_overlay(ground, inspection.anomaly_map, threshold=inspection.threshold))
