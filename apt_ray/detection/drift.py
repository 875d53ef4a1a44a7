"""Whether images and scores are still what they were: sequential tests on live images.

The first images of a version are the *reference*. Each later value of a *stream* (score,
brightness, ...) either lies in the reference's tail of `TAIL`, or does not. As long as all images
are exchangeable, the next one lies there with probability (m + k) / (n + 1 + t): the m-th largest
of n values bounds the tail, and k of t later values lay beyond it. That is exact whatever the
distribution is and however small n; it is the rank among all earlier values of Vovk, Nouretdinov
and Gammerman (Testing exchangeability on-line, ICML 2003), cut in two. A bet at these odds is a
test martingale; the Shiryaev-Roberts sum of such bets, one begun at each image (Vovk, Testing
randomness online, Statistical Science 36, 2021; Shin, Ramdas and Rinaldo, E-detectors, 2022,
arXiv 2203.03532), is an e-detector: its value minus the number of images is a martingale. The
`K` tests alarm at K / `false_alarms`, so together

- the mean number of images until a false alarm is at least 1 / `false_alarms`, and
- the probability of one within T images is at most T * `false_alarms` (Doob),

on one replica or on many that share the images, since both are per image. A tolerance, by which a
value has to exceed the tail's bound to be bet on, makes every bet smaller and keeps both.

What this does not cover: images that follow one another alike (lots, daylight) are not
exchangeable. What recurs must have occurred in the reference.

Nothing here imports torch: the controller reads the messages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from apt_ray.config import Settings

TAIL = 0.05
"""The share of the reference that its tail is, on each side."""

STAKE = 4.0
"""What a value in the tail multiplies the evidence by, before it is divided by its expectation.

With it the evidence for a tail of 5 % grows once it holds 10 % of the images: a few more defects
than there were are no drift. A larger one tells an abrupt change some images sooner, and a growing
share of defects later or not at all."""

_SETTLING = 4  # one in so many of the reference's images says where the middle is
_JITTER = 1e-9  # breaks ties at random, as the ranks need it
_MOST = 1e200
_LUMINANCE_3 = np.array([0.2126, 0.7152, 0.0722], np.float32)
_EPSILON = 1e-6

StreamName = Literal["calibration", "score", "brightness", "sharpness", "colour", "appearance"]
Floats = NDArray[np.float64]


class DriftSettings(Settings):
    """When it is said that images or scores have drifted."""

    false_alarms: float = Field(
        default=1e-8,
        gt=0,
        lt=1,
        description="Per image at most, of all streams of a category together.",
    )
    reference: int = Field(
        default=400,
        ge=20,
        le=100_000,
        description="The first images of a version, with which later ones are compared.",
    )
    tolerance: float = Field(
        default=1.5,
        ge=0,
        description="How far beyond the reference's tail a value has to lie, in its interquartile"
        " ranges.",
    )


class DriftAlarm(Settings):
    """Something is no longer as it was."""

    stream: StreamName
    direction: Literal["higher", "lower"]
    says: str = Field(description="In words: `images are darker than they were`.")
    since: str = Field(description="Estimated time of the change, ISO 8601, UTC.")
    at: str = Field(description="When it was noticed.")
    images: int = Field(description="How many images that took.")
    before: float = Field(description="Mean of the reference.")
    after: float = Field(description="Mean since.")


@dataclass(frozen=True, slots=True)
class Stream:
    """A number that each image has.

    Attributes:
        least: a change that is too small to matter, whatever the reference.
        higher, lower: what it means; without `lower` nothing is wrong with smaller values.
    """

    name: StreamName
    least: float
    higher: str
    lower: str = ""


CALIBRATION = Stream("calibration", 0.005, "parts score higher than the calibration images")
LIVE = (
    Stream("score", 0.005, "parts score higher than they did", "parts score lower than they did"),
    Stream(
        "brightness", 0.01, "images are brighter than they were", "images are darker than they were"
    ),
    Stream(
        "sharpness", 0.05, "images are sharper than they were", "images are blurrier than they were"
    ),
    Stream("colour", 0.004, "images have other colours than they had"),
    Stream("appearance", 0.0005, "images look different than they did"),
)
STREAMS: tuple[StreamName, ...] = (CALIBRATION.name, *(stream.name for stream in LIVE))
TESTS = 1 + sum(2 if stream.lower else 1 for stream in LIVE)
"""K, the number of tests: a stream has one for each side that matters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Appearance:
    """What a whole image looks like.

    Attributes:
        brightness: mean luminance (Rec. 709 weights, of the values as they are stored), 0..1.
        sharpness: logarithm of the variance of the Laplacian (Pech-Pacheco et al., ICPR 2000) over
            that of the luminance, so that a darker image is not a blurrier one.
        colour: red's and green's share of the sum of the channels.
    """

    brightness: float
    sharpness: float
    colour: tuple[float, float]


def appearance_of(pixels_3HW: NDArray[np.float32]) -> Appearance:
    """The appearance of an image of at least 3 x 3 pixels in 0..1."""
    pixels_3HW = np.ascontiguousarray(pixels_3HW)  # an image decoded by Pillow is not
    means_3 = pixels_3HW.mean((1, 2))
    light_HW = (_LUMINANCE_3 @ pixels_3HW.reshape(3, -1)).reshape(pixels_3HW.shape[1:])
    edges_HW = light_HW[1:-1, 1:-1] * np.float32(-4)
    edges_HW += light_HW[:-2, 1:-1]
    edges_HW += light_HW[2:, 1:-1]
    edges_HW += light_HW[1:-1, :-2]
    edges_HW += light_HW[1:-1, 2:]
    total = float(means_3.sum()) + _EPSILON
    return Appearance(
        brightness=float(_LUMINANCE_3 @ means_3),
        sharpness=math.log((float(edges_HW.var()) + _EPSILON) / (float(light_HW.var()) + _EPSILON)),
        colour=(float(means_3[0]) / total, float(means_3[1]) / total),
    )


class Tails:
    """One-sided tests of values against what a reference says of them, any number of them at once.

    All arrays have the shape of `bounds`, or broadcast to it.

    Args:
        bounds: the m-th largest value of each reference.
        ranks: m.
        sizes: n, the number of values in it.
        margins: by how much a value has to exceed the bound to count as evidence.

    Attributes:
        evidence: the Shiryaev-Roberts sum; an alarm where it is at least the mean number of values
            until a false one.
        begun: `at` of the first value of the run that speaks most for a change (the CUSUM's).
        count, total: the values of that run, and their sum.
    """

    def __init__(
        self, bounds: ArrayLike, ranks: ArrayLike, sizes: ArrayLike, margins: ArrayLike
    ) -> None:
        self._bounds = np.asarray(bounds, np.float64)
        self._margins = np.asarray(margins, np.float64)
        self._ranks = np.asarray(ranks, np.float64)
        self._sizes = np.asarray(sizes, np.float64)
        self.reset()

    @classmethod
    def of(cls, reference_NX: ArrayLike, margins_X: ArrayLike) -> Tails:
        """Tests against references of N values each, whatever shape X has."""
        ordered_NX = np.sort(np.asarray(reference_NX, np.float64), axis=0)
        size = len(ordered_NX)
        rank = max(1, int(TAIL * (size + 1)))
        return cls(ordered_NX[-rank], rank, size, margins_X)

    def reset(self) -> None:
        """Forget all values but the references."""
        shape = self._bounds.shape
        self._seen = 0
        self._exceeded = np.zeros(shape)
        self._cusum = np.ones(shape)
        self.evidence = np.zeros(shape)
        self.begun = np.zeros(shape)
        self.count = np.zeros(shape)
        self.total = np.zeros(shape)

    def add(self, values: Floats, at: float = 0.0) -> None:
        """One more value of each."""
        share = (self._ranks + self._exceeded) / (self._sizes + 1 + self._seen)
        bet = np.where(values > self._bounds + self._margins, STAKE, 1.0)
        bet /= 1 + (STAKE - 1) * share
        self.evidence = np.minimum((self.evidence + 1) * bet, _MOST)
        fresh = self._cusum <= 1
        self._cusum = np.minimum(np.where(fresh, 1.0, self._cusum) * bet, _MOST)
        self.begun = np.where(fresh, at, self.begun)
        self.count = np.where(fresh, 0.0, self.count) + 1
        self.total = np.where(fresh, 0.0, self.total) + values
        self._exceeded = self._exceeded + (values > self._bounds)
        self._seen += 1


class Panel:
    """The tests of some streams, each on the sides that matter.

    Args:
        streams: S of them.
        reference_NRS: N values of each, of one category (R is absent) or of several side by side.
        settings: when it alarms.
    """

    def __init__(
        self, streams: Sequence[Stream], reference_NRS: ArrayLike, settings: DriftSettings
    ) -> None:
        values_NRS = np.asarray(reference_NRS, np.float64)
        tests = [
            (index, stream, sign)
            for index, stream in enumerate(streams)
            for sign in ((1, -1) if stream.lower else (1,))
        ]
        self._streams = [stream for _, stream, _ in tests]
        self._columns = np.array([index for index, _, _ in tests])
        self._signs = np.array([sign for _, _, sign in tests], np.float64)
        self._means_RS = values_NRS.mean(0)
        # Of the middle half, since it is as wide whatever the share of defects is.
        low_RS, high_RS = np.quantile(values_NRS, [0.25, 0.75], axis=0)
        least_S = np.array([stream.least for stream in streams])
        margins_RS = np.maximum(least_S, settings.tolerance * (high_RS - low_RS))
        self._tails = Tails.of(
            values_NRS[..., self._columns] * self._signs, margins_RS[..., self._columns]
        )
        self._limit = TESTS / settings.false_alarms

    def reset(self) -> None:
        """Forget all values but the reference."""
        self._tails.reset()

    def add(self, values_RS: Floats, at: float = 0.0) -> NDArray[np.bool_]:
        """One more image; which tests alarm now, (R, tests)."""
        self._tails.add(values_RS[..., self._columns] * self._signs, at)
        alarms: NDArray[np.bool_] = self._tails.evidence >= self._limit
        return alarms

    def evidence(self) -> dict[StreamName, float]:
        """How near each stream is to an alarm, by the logarithm of its evidence, 0..1."""
        found: dict[StreamName, float] = {}
        nearness = np.log1p(self._tails.evidence) / math.log1p(self._limit)
        for stream, near in zip(self._streams, nearness.tolist(), strict=True):
            found[stream.name] = max(found.get(stream.name, 0.0), min(near, 1.0))
        return found

    def alarm(self, test: int, at: float) -> DriftAlarm:
        """What a test that alarms says."""
        stream, tails = self._streams[test], self._tails
        is_higher = self._signs[test] > 0
        return DriftAlarm(
            stream=stream.name,
            direction="higher" if is_higher else "lower",
            says=stream.higher if is_higher else stream.lower,
            since=_iso(tails.begun[test]),
            at=_iso(at),
            images=int(tails.count[test]),
            before=round(float(self._means_RS[self._columns[test]]), 4),
            after=round(float(self._signs[test] * tails.total[test] / tails.count[test]), 4),
        )


class DriftWatch:
    """Watches the live images of one category as one version inspects them; of one thread.

    Args:
        settings: how long it learns, and when it alarms.
        calibration: anomaly scores of calibration images, which good parts score alike: they are
            watched from the first image on. Empty if there are none.
        seed: of the random breaking of ties.
    """

    def __init__(
        self,
        settings: DriftSettings,
        *,
        calibration: Sequence[float] = (),
        seed: int | None = None,
    ) -> None:
        self._settings = settings
        self._settled = settings.reference // _SETTLING
        self._rng = np.random.default_rng(seed)
        self._calibration: Panel | None = None
        if calibration:
            column = np.asarray(calibration, np.float64)[:, None]
            self._calibration = Panel((CALIBRATION,), column, settings)
        self._alarms: dict[StreamName, DriftAlarm] = {}
        self._learn()

    def _learn(self) -> None:
        self._live: Panel | None = None
        self._seen = 0
        self._middle_X: Floats = np.zeros(1)
        self._reference: list[Floats] = []

    @property
    def alarms(self) -> tuple[DriftAlarm, ...]:
        """What has drifted until somebody resets it, each stream once, the first first."""
        return tuple(self._alarms.values())

    @property
    def learning(self) -> int:
        """Images that the reference still lacks."""
        return max(0, self._settings.reference - self._seen)

    def evidence(self) -> dict[StreamName, float]:
        """How near each stream that is watched already is to an alarm, 0..1."""
        found = self._calibration.evidence() if self._calibration else {}
        found |= self._live.evidence() if self._live else {}
        return found | dict.fromkeys(self._alarms, 1.0)

    def add(
        self,
        *,
        score: float,
        appearance: Appearance,
        features_W: NDArray[np.floating[Any]],
        at: float,
    ) -> tuple[DriftAlarm, ...]:
        """One more image; returns the alarms that it raises.

        Args:
            features_W: of the whole image, `ImageFeatures.whole_BW`.
            at: when, in seconds since 1970.
        """
        numbers_5 = (score, appearance.brightness, appearance.sharpness, *appearance.colour)
        if not (all(map(math.isfinite, numbers_5)) and np.isfinite(features_W).all()):
            return ()
        image_X = np.concatenate([numbers_5, _direction(features_W)])
        jitter = self._rng.uniform(-_JITTER, _JITTER, len(STREAMS))
        raised = []
        if self._calibration:
            raised += _told(self._calibration, np.array([score + jitter[0]]), at)
        self._seen += 1
        if self._seen <= self._settled:
            # Where the middle is, those images say that it is not tested on.
            self._middle_X = self._middle_X + image_X / self._settled
        else:
            values_S = self._values(image_X) + jitter[1:]
            if self._live:
                raised += _told(self._live, values_S, at)
            else:
                self._reference.append(values_S)
                if not self.learning:
                    self._live = Panel(LIVE, self._reference, self._settings)
                    self._reference = []
        news = []
        for alarm in raised:
            if alarm.stream not in self._alarms:
                self._alarms[alarm.stream] = alarm
                news.append(alarm)
        return tuple(news)

    def reset(self, *, anew: bool = False) -> None:
        """Take back all alarms, and compare the images from now on.

        Args:
            anew: whether they make a new reference, in the place of the old one and of the
                calibration images.
        """
        self._alarms = {}
        if anew:
            self._calibration = None
            self._learn()
        for panel in (self._calibration, self._live):
            if panel:
                panel.reset()

    def _values(self, image_X: Floats) -> Floats:
        """One value a live stream; how far colour and features are from the middle of the first
        images."""
        away_2 = image_X[3:5] - self._middle_X[3:5]
        cosine = image_X[5:] @ _direction(self._middle_X[5:])
        return np.array([*image_X[:3], np.linalg.norm(away_2), 1 - cosine])


def _told(panel: Panel, values_S: Floats, at: float) -> list[DriftAlarm]:
    return [panel.alarm(int(test), at) for test in np.flatnonzero(panel.add(values_S, at))]


def _direction(vector_W: NDArray[np.floating[Any]]) -> Floats:
    """The vector at unit length; one without any length as it is."""
    exact_W = np.asarray(vector_W, np.float64)
    return exact_W / max(float(np.linalg.norm(exact_W)), _EPSILON)


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
