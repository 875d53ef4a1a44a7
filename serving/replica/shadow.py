"""Candidates that are tried behind the answers, on a share of the images.

The candidate scores the features that the champion's encoder gave, while the model has nothing else
to do; where its own encoder is another, the image is decoded and encoded once more. What is chosen
while too much waits is dropped and counted.
"""

import asyncio
import hashlib
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from typing import Protocol, TypeVar

import torch

from apt_ray.errors import AptError
from apt_ray.features.protocol import ImageFeatures
from serving.api.history import KeptCandidate
from serving.api.problems import ProblemError
from serving.controller.orders import Order, pair_of
from serving.controller.shadow import ShadowCounts, ShadowOrder, ShadowReport, shift_bin
from serving.logs import logger
from serving.replica.beside import Beside, Prepare
from serving.replica.meter import Meter
from serving.replica.served import ServedCategory

# What may wait to be tried: a burst, and no more memory than a few large images.
_MOST_WAITING = 16
_MOST_BYTES = 64 * 2**20
# The answer goes out first.
_AFTER_S = 0.002
_AGAIN_S = 60.0

Found = TypeVar("Found")

_OUTCOMES = {
    (False, False): "agrees",
    (True, True): "agrees",
    (False, True): "candidate rejects",
    (True, False): "champion rejects",
}

Then = Callable[[KeptCandidate | None], None]
"""Is told what the candidate found, None if it was not asked."""


class WhenIdle(Protocol):
    """What a call returns that is made once nothing else is to be done."""

    async def __call__(self, work: Callable[[], Found]) -> Found: ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answered:
    """An image that the champion has answered for.

    Attributes:
        champion: what answered.
        score: its anomaly score.
        features: of the batch that the image was in, by the champion's encoder.
        row: its place there.
        data: the image file.
    """

    champion: ServedCategory
    score: float
    features: ImageFeatures
    row: int
    data: bytes

    @property
    def bytes(self) -> int:
        """What it keeps in memory, on whatever device."""
        tensors = (self.features.tokens_BNE, self.features.cls_BE, *self.features.layers.values())
        return len(self.data) + sum(each.numel() * each.element_size() for each in tensors)


@dataclass(kw_only=True, slots=True, eq=False)
class _Trial:
    """A candidate, and what it has found so far.

    Attributes:
        champion: what it is tried beside; another one of the same order may take its place.
        candidate: None until it is loaded.
        loading: what loads it, if it is.
        again_at: when loading may be tried again, of the clock.
        verdicts: (champion rejects, candidate rejects) -> images.
        shift: sum of candidate's scores - champion's; `shifts` are the same by bins.
    """

    order: ShadowOrder
    champion: ServedCategory
    candidate: ServedCategory | None = None
    loading: asyncio.Task[None] | None = None
    problem: str | None = None
    again_at: float = 0.0
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    since: float | None = None
    verdicts: Counter[tuple[bool, bool]] = field(default_factory=Counter)
    dropped: int = 0
    shift: float = 0.0
    shifts: Counter[int] = field(default_factory=Counter)

    @property
    def report(self) -> ShadowReport:
        since = None
        if self.since is not None:
            at = datetime.fromtimestamp(self.since, timezone.utc)
            since = at.isoformat(timespec="seconds")
        return ShadowReport(
            id=self.id,
            pair=self.order.pair,
            since=since,
            is_loaded=self.candidate is not None,
            problem=self.problem,
            counts=ShadowCounts(
                both_pass=self.verdicts[False, False],
                both_reject=self.verdicts[True, True],
                candidate_rejects=self.verdicts[False, True],
                champion_rejects=self.verdicts[True, False],
                dropped=self.dropped,
                shift=self.shift,
                shifts=dict(self.shifts),
            ),
        )


class Shadow:
    """Tries the candidates of a replica's categories; of the event loop's thread.

    Args:
        beside: has their versions; it keeps one for each category that is tried.
        prepare: makes a version ready to inspect.
        when_idle: runs what it is given by the thread that owns the model, once that is free.
        pixels: an image file as a version wants it, `(1, 3, H, W)`; raises ImageError.
        meter: counts; None where nothing does.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        beside: Beside,
        *,
        prepare: Prepare,
        when_idle: WhenIdle,
        pixels: Callable[[ServedCategory, bytes], torch.Tensor],
        meter: Meter | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._beside = beside
        self._prepare = prepare
        self._when_idle = when_idle
        self._pixels = pixels
        self._meter = meter
        self._clock = clock
        self._orders: Mapping[str, ShadowOrder] = {}
        self._trials: dict[str, _Trial] = {}
        self._decoder = ThreadPoolExecutor(1, "shadow")
        self._trying: set[asyncio.Task[None]] = set()
        self._bytes = 0

    def follow(self, orders: Mapping[str, ShadowOrder]) -> None:
        """Try these from now on, and no others."""
        self._orders = orders
        for category, trial in list(self._trials.items()):
            order = orders.get(category)
            if order is not None and order.pair == trial.order.pair:
                trial.order = order
            else:
                del self._trials[category]
        self._hold()

    def chooses(self, category: str, request_id: str) -> bool:
        """Whether an image is among the share to be tried: always the same for the same id."""
        order = self._orders.get(category)
        if order is None:
            return False
        digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < order.share * 2**64

    def try_on(self, answered: Answered, then: Then) -> None:
        """Let the candidate score an image, and say so to `then`; returns at once."""
        trial = self._trial_of(answered.champion)
        if trial is None or trial.candidate is None:
            then(None)
        elif len(self._trying) >= _MOST_WAITING or 0 < self._bytes > _MOST_BYTES - answered.bytes:
            trial.dropped += 1
            self._count(trial, "dropped")
            then(None)
        else:
            self._bytes += answered.bytes
            task = asyncio.create_task(self._try(trial, trial.candidate, answered, then))
            self._trying.add(task)
            task.add_done_callback(self._trying.discard)

    def reports(self) -> dict[str, ShadowReport]:
        """For each category whose candidate is tried and has seen an image."""
        for trial in self._trials.values():
            if self._meter and (images := trial.verdicts.total()):
                order, category = trial.order, trial.champion.about.category
                mean = trial.shift / images
                self._meter.shadow_shift(category, order.champion, order.candidate, mean)
        return {category: trial.report for category, trial in self._trials.items()}

    # ---- the candidates

    def _trial_of(self, champion: ServedCategory) -> _Trial | None:
        """The trial beside what serves; None if the orders are for something else."""
        category = champion.about.category
        trial, order = self._trials.get(category), self._orders.get(category)
        if order is None:
            return None
        if trial is None or trial.champion is not champion:
            if pair_of(champion.order, order.candidate) != order.pair:
                return None
            if trial is None:
                trial = self._trials[category] = _Trial(order=order, champion=champion)
                self._hold()
            trial.champion = champion
        if trial.candidate is None and trial.loading is None and self._clock() >= trial.again_at:
            trial.loading = asyncio.create_task(self._load(trial))
        return trial

    async def _load(self, trial: _Trial) -> None:
        category = trial.champion.about.category
        try:
            trial.candidate = await self._beside.get(category, _order_of(trial), self._prepare)
            trial.problem = None
        except Exception as error:
            known = isinstance(error, AptError | ProblemError)
            trial.problem = str(error) if known else repr(error)
            trial.again_at = self._clock() + _AGAIN_S
            logger.warning("the candidate of %s is not tried: %s", category, trial.problem)
        trial.loading = None

    def _hold(self) -> None:
        self._beside.hold([(name, _order_of(trial)) for name, trial in self._trials.items()])

    # ---- the images

    async def _try(
        self, trial: _Trial, candidate: ServedCategory, answered: Answered, then: Then
    ) -> None:
        found: KeptCandidate | None = None
        try:
            await asyncio.sleep(_AFTER_S)
            pixels_1CHW = None
            if not _share_features(answered.champion, candidate):
                pixels_1CHW = await asyncio.get_running_loop().run_in_executor(
                    self._decoder, self._pixels, candidate, answered.data
                )
            score = await self._when_idle(partial(_score, candidate, answered, pixels_1CHW))
            found = self._add(trial, candidate, answered, score)
        except Exception as error:
            trial.problem = f"it cannot score an image: {error}"
        finally:
            self._bytes -= answered.bytes
            then(found)

    def _add(
        self, trial: _Trial, candidate: ServedCategory, answered: Answered, score: float
    ) -> KeptCandidate:
        threshold = candidate.detector.prompt_set.threshold
        rejects = threshold.rejects(score)
        rejected = answered.champion.detector.prompt_set.threshold.rejects(answered.score)
        if trial.since is None:
            trial.since = self._clock()
        trial.verdicts[rejected, rejects] += 1
        trial.shift += score - answered.score
        trial.shifts[shift_bin(score - answered.score)] += 1
        trial.problem = None
        self._count(trial, _OUTCOMES[rejected, rejects])
        return KeptCandidate(
            version=trial.order.candidate,
            score=score,
            threshold=threshold.value,
            is_anomalous=rejects,
        )

    def _count(self, trial: _Trial, outcome: str) -> None:
        if self._meter:
            order, category = trial.order, trial.champion.about.category
            self._meter.tried(category, order.champion, order.candidate, outcome)


def _order_of(trial: _Trial) -> Order:
    """The candidate as it would serve."""
    return trial.champion.order.model_copy(update={"version": trial.order.candidate})


def _share_features(one: ServedCategory, other: ServedCategory) -> bool:
    """Whether both see the same in an image file; `Reading.peak` only refuses some."""
    same_backbone = one.detector.backbone is other.detector.backbone
    this, that = one.detector.reading, other.detector.reading
    return same_backbone and (this.white_level, this.ground) == (that.white_level, that.ground)


@torch.inference_mode()
def _score(
    candidate: ServedCategory, answered: Answered, pixels_1CHW: torch.Tensor | None
) -> float:
    if pixels_1CHW is None:
        features = answered.features
        if len(features) > 1:
            features = features[[answered.row]]
    else:
        features = candidate.detector.backbone.encode_images(pixels_1CHW)
    _, scores_B = candidate.detector.score(features)
    return float(scores_B[0])
