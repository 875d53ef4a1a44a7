"""Small heads that learn from confirmed defects, and ways to let them into the score.

After MeLIAD (arXiv 2409.13602): a metric over frozen features that few confirmed defects teach. All
ways but those of `reweighted` only add evidence to what is served: no score falls.

B images, F places of the finest grid, K kinds of evidence, D channels of a feature, N confirmed
defects, X places of these, Y good places, S pixels a side of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from math import isqrt
from statistics import median
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from apt_ray.detection.kinds import around_peak
from apt_ray.detection.rule import MOST_EVIDENCE, TOP_SHARE, ScoreRule, top_mean
from apt_ray.images import cover

Feature = Literal["looks_BFD", "left_over_BFD"]
Metric = Literal["full", "diagonal", "removed"]

_WEIGHT = 0.5
"""Of a head's evidence, beside 1 of what is served."""

_SHRINKAGE = 0.1
"""Of the covariance of good places, towards that of equal deviations."""

_REMOVED = 0.9
"""Share of what good places vary in whose directions are removed."""

_MOST_PLACES = 16
"""Of one confirmed defect, the most anomalous."""

_BORDER = 2
"""Places around a mask that are neither defect nor good."""

_FAINTEST = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Seen:
    """Images in front of a memory.

    Attributes:
        excess_BKF: what is above the ordinary, squared, of each kind of evidence, the prompts
            first, in 0..1.
        looks_BFD: directions of the layers side by side.
        left_over_BFD: what is left of a place after the nearest place in memory, all layers side by
            side, each of length 1 in the mean of left-out support images.
        distances_BF: cosine distance to the nearest place in memory, mean of the layers that are
            compared by directions.
        peaks_BD: what the most anomalous part looks like, of unit length.
    """

    excess_BKF: torch.Tensor
    looks_BFD: torch.Tensor
    left_over_BFD: torch.Tensor
    distances_BF: torch.Tensor
    peaks_BD: torch.Tensor

    def __len__(self) -> int:
        return len(self.peaks_BD)

    def __getitem__(self, index: Sequence[int] | slice) -> Seen:
        return Seen(**{one.name: getattr(self, one.name)[index] for one in fields(self)})

    @staticmethod
    def joined(parts: Sequence[Seen]) -> Seen:
        """The images of all parts, in order."""
        return Seen(
            **{
                one.name: torch.cat([getattr(part, one.name) for part in parts])
                for one in fields(Seen)
            }
        )


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over good places, from which any share of them has its mean and covariance."""

    count: int
    sum_D: torch.Tensor
    square_DD: torch.Tensor

    @classmethod
    def of(cls, tokens_YD: torch.Tensor) -> Moments:
        return cls(len(tokens_YD), tokens_YD.sum(0), tokens_YD.T @ tokens_YD)

    @staticmethod
    def joined(parts: Sequence[Moments]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean `(D,)` and covariance `(D, D)` of all of them."""
        count = sum(part.count for part in parts)
        mean_D = torch.stack([part.sum_D for part in parts]).sum(0) / count
        square_DD = torch.stack([part.square_DD for part in parts]).sum(0) / count
        return mean_D, square_DD - mean_D[:, None] * mean_D


Measure = Callable[[Sequence[int]], Callable[[torch.Tensor], torch.Tensor]]
"""Sources that teach -> features of places `(..., D)` -> a value for each place `(...)`."""


class Good:
    """Good images, each in front of a memory that was made without its own source.

    Attributes:
        seen: the images, the left-out support images first.
        source_B: which support image each was made of; of further images a number in their place.
    """

    def __init__(self, seen: Seen, source_B: torch.Tensor) -> None:
        self.seen, self.source_B = seen, source_B
        self._moments: dict[Feature, list[Moments]] = {}

    @property
    def sources(self) -> int:
        return int(self.source_B.max()) + 1

    def moments(self, feature: Feature) -> list[Moments]:
        """Of each source."""
        if feature not in self._moments:
            tokens_BFD = getattr(self.seen, feature)
            self._moments[feature] = [
                Moments.of(tokens_BFD[self.source_B == source].flatten(0, 1))
                for source in range(self.sources)
            ]
        return self._moments[feature]

    def crossed(self, feature: Feature, measure: Measure) -> torch.Tensor:
        """`(B, F)` places of each image, measured by what the other sources alone have taught."""
        tokens_BFD = getattr(self.seen, feature)
        measured_BF = torch.empty(tokens_BFD.shape[:2])
        for source in range(self.sources):
            is_own_B = self.source_B == source
            by_others = measure([other for other in range(self.sources) if other != source])
            measured_BF[is_own_B] = by_others(tokens_BFD[is_own_B])
        return measured_BF


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """A category that was fitted to S support images, and what its heads are measured on.

    Attributes:
        rule: as it is served.
        threshold: that of the fit.
        goods: what a head may know of good images: the S left-out support images, as `left out`, or
            these and others behind them.
        tested: the test images.
        remembered: the same in front of a memory that further good images joined.
    """

    rule: ScoreRule
    threshold: float
    goods: Mapping[str, Good]
    tested: Seen
    remembered: Seen

    @property
    def left_out(self) -> Seen:
        return self.goods["left out"].seen

    @cached_property
    def weights_K(self) -> torch.Tensor:
        """What each kind of evidence weighs in the score that is served."""
        layers = self.tested.excess_BKF.shape[1] - 1
        weight = self.rule.reference_weight
        return torch.tensor([1 - weight, *[weight / layers] * layers])

    @cached_property
    def served(self) -> Scores:
        """Without any head."""
        return self.scores(self.tested), self.scores(self.left_out)

    def scores(self, seen: Seen, added_BF: torch.Tensor | float = 0.0) -> torch.Tensor:
        """Anomaly scores `(B,)`, with evidence in 0..1 that is added to that of the map."""
        fused_BF = torch.einsum("k,bkf->bf", self.weights_K, seen.excess_BKF) + added_BF
        return self.rule.score_patches(fused_BF)[1].sqrt()

    def gains(self, seen: Seen, excess_BF: torch.Tensor) -> list[float]:
        """By how much a head raises the scores of images."""
        raised_B = self.scores(seen, _WEIGHT * excess_BF) - self.scores(seen)
        return [float(gain) for gain in raised_B]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Confirmed:
    """N confirmed defects.

    Attributes:
        seen: their images; `peaks_BD` is the look of the defect.
        where: of each, the places of the defect.
        outside_NF: bool, the places that a mask says are good; none where there is no mask.
    """

    seen: Seen
    where: tuple[torch.Tensor, ...]
    outside_NF: torch.Tensor

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, index: list[int]) -> Confirmed:
        return Confirmed(
            seen=self.seen[index],
            where=tuple(self.where[number] for number in index),
            outside_NF=self.outside_NF[index],
        )

    def without(self, number: int) -> Confirmed:
        return self[[other for other in range(len(self)) if other != number]]

    def places(self, feature: Feature) -> list[torch.Tensor]:
        """Of each defect, the feature of its places `(X, D)`."""
        tokens_NFD = getattr(self.seen, feature)
        return [
            tokens_FD[where_X] for tokens_FD, where_X in zip(tokens_NFD, self.where, strict=True)
        ]


def defect_places(map_SS: torch.Tensor, places: int) -> torch.Tensor:
    """`(X,)` the places of a square grid in which a defect's map has its highest part."""
    side = isqrt(places)

    def shrunk(values_SS: torch.Tensor) -> torch.Tensor:
        return F.interpolate(values_SS[None, None], size=(side, side), mode="area").flatten()

    there_F = shrunk(around_peak(map_SS))
    values_F = torch.where(there_F >= min(0.5, float(there_F.max())), shrunk(map_SS), -1.0)
    values_X, where_X = values_F.topk(min(_MOST_PLACES, places))
    return where_X[values_X >= 0]


def outside(mask_HW: NDArray[np.bool_], places: int) -> torch.Tensor:
    """`(F,)` bool, the places of a square grid that lie well outside of a mask."""
    side = isqrt(places)
    covered_ss = torch.from_numpy(cover(mask_HW, (side, side))).float()
    near_1ss = F.max_pool2d(covered_ss[None], 2 * _BORDER + 1, stride=1, padding=_BORDER)
    return near_1ss.flatten() == 0


Scores = tuple[torch.Tensor, torch.Tensor]
"""Of the test images `(B,)`, and of the left-out support images `(S,)`."""

Way = Callable[[Scene, Confirmed], Scores]
"""How confirmed defects change the scores."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Head:
    """What was learned.

    Attributes:
        excess: images -> evidence `(B, F)` in 0..1, 0 where a place is ordinary.
        good: the good images that say what is ordinary.
        of_good_BF: evidence in these.
    """

    excess: Callable[[Seen], torch.Tensor]
    good: Good
    of_good_BF: torch.Tensor


Learn = Callable[[Scene, Confirmed], Head | None]
"""None where nothing was learned that may join."""


def joined(learn: Learn, *, weight: float = _WEIGHT) -> Way:
    """Adds a head's evidence to the map's."""

    def way(scene: Scene, confirmed: Confirmed) -> Scores:
        head = learn(scene, confirmed)
        if head is None:
            return scene.served
        own_SF = head.of_good_BF[: len(scene.left_out)]
        return (
            scene.scores(scene.tested, weight * head.excess(scene.tested)),
            scene.scores(scene.left_out, weight * own_SF),
        )

    return way


def ratio(*, good: str = "left out", highest: bool = False) -> Learn:
    """How much farther the nearest place in memory is than the nearest confirmed place."""

    def learn(scene: Scene, confirmed: Confirmed) -> Head:
        known = scene.goods[good]
        of_good_BF = _log_ratio(known.seen, confirmed)
        excess = _excess(of_good_BF, highest=highest)
        return Head(
            excess=lambda seen: excess(_log_ratio(seen, confirmed)),
            good=known,
            of_good_BF=excess(of_good_BF),
        )

    return learn


def discriminant(
    feature: Feature,
    *,
    metric: Metric = "full",
    good: str = "left out",
    crossed: bool = False,
    highest: bool | Literal["usual"] = False,
    masks: bool = False,
    each: bool = False,
) -> Learn:
    """The linear discriminant between confirmed and good places.

    Args:
        metric: the covariance of good places, shrunk by a tenth; its diagonal; or none, but the
            directions that good places vary in most are taken out.
        crossed: measure each good image by a head that did not learn from its source.
        highest: count only what is above the highest place of all good images; or, `usual`, above
            the mean of the highest places of each.
        masks: learn as good, too, what lies outside of the masks of confirmed defects.
        each: a direction for each confirmed defect, of which the farthest counts, instead of one.
    """

    def learn(scene: Scene, confirmed: Confirmed) -> Head:
        known = scene.goods[good]
        tokens_BFD, moments = getattr(known.seen, feature), known.moments(feature)
        defects_DN = torch.stack([x_XD.mean(0) for x_XD in confirmed.places(feature)], 1)
        if not each:
            defects_DN = defects_DN.mean(1, keepdim=True)
        further = []
        if masks and confirmed.outside_NF.any():
            further = [Moments.of(getattr(confirmed.seen, feature)[confirmed.outside_NF])]

        def measure(sources: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor]:
            """In deviations of good places of these sources."""
            parts = [moments[source] for source in sources] + further
            mean_D, covariance_DD = Moments.joined(parts)
            towards_DN = _directions(defects_DN - mean_D[:, None], covariance_DD, metric=metric)
            variance_N = (towards_DN * (covariance_DD @ towards_DN)).sum(0)
            towards_DN = towards_DN / variance_N.clamp_min(_FAINTEST**2).sqrt()
            middle_N = mean_D @ towards_DN
            return lambda tokens: (tokens @ towards_DN - middle_N).amax(-1)

        learned = measure(range(known.sources))
        measured_BF = known.crossed(feature, measure) if crossed else learned(tokens_BFD)
        excess = _excess(measured_BF, highest=highest)
        return Head(
            excess=lambda seen: excess(learned(getattr(seen, feature))),
            good=known,
            of_good_BF=excess(measured_BF),
        )

    return learn


def alike(learn: Learn) -> Learn:
    """A head's evidence at places alone that are more like a confirmed place, beside the nearest
    place in memory, than 19 in 20 of good images are."""

    def restricted(scene: Scene, confirmed: Confirmed) -> Head | None:
        head = learn(scene, confirmed)
        if head is None:
            return None
        of_good_BF = _log_ratio(head.good.seen, confirmed)
        limit = float(of_good_BF.flatten().kthvalue(int(0.95 * of_good_BF.numel())).values)
        return Head(
            excess=lambda seen: head.excess(seen) * (_log_ratio(seen, confirmed) > limit),
            good=head.good,
            of_good_BF=head.of_good_BF * (of_good_BF > limit),
        )

    return restricted


def unusual(*, good: str = "altered") -> Learn:
    """A control that no defect teaches: how long what is left over is, in the metric of good
    places, above the highest place of good images."""

    @lru_cache(maxsize=1)
    def of_scene(scene: Scene) -> Head:
        known = scene.goods[good]
        moments = known.moments("left_over_BFD")

        def measure(sources: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor]:
            mean_D, covariance_DD = Moments.joined([moments[source] for source in sources])
            whitening_DD = torch.linalg.inv(torch.linalg.cholesky(_shrunk(covariance_DD))).T
            return lambda tokens: ((tokens - mean_D) @ whitening_DD).norm(dim=-1)

        measured_BF = known.crossed("left_over_BFD", measure)
        excess = _excess(measured_BF, highest=True)
        learned = measure(range(known.sources))
        of_tested_BF = excess(learned(scene.tested.left_over_BFD))
        return Head(excess=lambda _tested: of_tested_BF, good=known, of_good_BF=excess(measured_BF))

    return lambda scene, _confirmed: of_scene(scene)


def enlarged(scene: Scene, _confirmed: Confirmed) -> Scores:
    """A control that no defect teaches: the further good images are in the memory."""
    return scene.scores(scene.remembered), scene.served[1]


def near(feature: Feature, *, good: str = "altered", agreed: bool = False) -> Learn:
    """Evidence only around confirmed places, each up to the nearest good place, as in a network of
    restricted Coulomb energy (Reilly, Cooper and Elbaum 1982).

    Args:
        agreed: only around places that a place of another confirmed defect lies around.
    """

    def learn(scene: Scene, confirmed: Confirmed) -> Head | None:
        by_defect = confirmed.places(feature)
        places_XD = torch.cat(by_defect)
        known = scene.goods[good]
        nearest_BX = torch.stack(
            [torch.cdist(x_FD, places_XD).amin(0) for x_FD in getattr(known.seen, feature)]
        )
        if agreed:
            of_X = torch.repeat_interleave(
                torch.arange(len(by_defect)), torch.tensor([len(x_XD) for x_XD in by_defect])
            )
            apart_XX = torch.cdist(places_XD, places_XD)
            apart_XX[of_X[:, None] == of_X] = torch.inf
            kept_X = apart_XX.amin(1) < nearest_BX.amin(0)
            if not kept_X.any():
                return None
            places_XD, nearest_BX = places_XD[kept_X], nearest_BX[:, kept_X]

        def around(tokens_BFD: torch.Tensor, radius_X: torch.Tensor) -> torch.Tensor:
            return torch.stack(
                [
                    (1 - torch.cdist(x_FD, places_XD) / radius_X.clamp_min(_FAINTEST))
                    .clamp_min(0)
                    .square()
                    .amax(1)
                    for x_FD in tokens_BFD
                ]
            )

        tokens_BFD = getattr(known.seen, feature)
        of_good_BF = torch.empty(tokens_BFD.shape[:2])
        for source in range(known.sources):
            is_own_B = known.source_B == source
            radius_X = nearest_BX[~is_own_B].amin(0)
            of_good_BF[is_own_B] = around(tokens_BFD[is_own_B], radius_X)
        radius_X = nearest_BX.amin(0)
        return Head(
            excess=lambda seen: around(getattr(seen, feature), radius_X),
            good=known,
            of_good_BF=of_good_BF,
        )

    return learn


def proven(learn: Learn) -> Learn:
    """Joins only if a confirmed defect gains more, learned without it, than any good image."""

    def gated(scene: Scene, confirmed: Confirmed) -> Head | None:
        head = learn(scene, confirmed) if len(confirmed) > 1 else None
        if head is None:
            return None
        gains = []
        for number in range(len(confirmed)):
            other, own = learn(scene, confirmed.without(number)), confirmed.seen[[number]]
            gains += scene.gains(own, other.excess(own)) if other else [0.0]
        passes = median(gains) > max(scene.gains(head.good.seen, head.of_good_BF))
        return head if passes else None

    return gated


def harmless(learn: Learn) -> Learn:
    """Joins only if none of the good images is rejected that was not before."""

    def gated(scene: Scene, confirmed: Confirmed) -> Head | None:
        head = learn(scene, confirmed)
        if head is None:
            return None
        before_B = scene.scores(head.good.seen) > scene.threshold
        after_B = scene.scores(head.good.seen, _WEIGHT * head.of_good_BF) > scene.threshold
        return head if torch.equal(before_B, after_B) else None

    return gated


def second_look(*, good: str = "altered") -> Way:
    """The most anomalous part of an image is compared with confirmed defects and with the most
    anomalous parts of good images; the score is raised by up to a half in squares."""

    def way(scene: Scene, confirmed: Confirmed) -> Scores:
        known = scene.goods[good]
        defects_ND, good_BD = confirmed.seen.peaks_BD, known.seen.peaks_BD

        def evidence(peaks_BD: torch.Tensor, good_YD: torch.Tensor) -> torch.Tensor:
            return (peaks_BD @ defects_ND.T).amax(1) - (peaks_BD @ good_YD.T).amax(1)

        of_good_B = torch.empty(len(good_BD))
        for source in range(known.sources):
            is_own_B = known.source_B == source
            of_good_B[is_own_B] = evidence(good_BD[is_own_B], good_BD[~is_own_B])
        excess = _excess(of_good_B, highest=False)

        def raised(scores_B: torch.Tensor, excess_B: torch.Tensor) -> torch.Tensor:
            return scores_B * (1 + _WEIGHT * excess_B).sqrt()

        tested_B, left_out_S = scene.served
        return (
            raised(tested_B, excess(evidence(scene.tested.peaks_BD, good_BD))),
            raised(left_out_S, excess(of_good_B)[: len(left_out_S)]),
        )

    return way


def reweighted(*, share: float, good: str = "altered") -> Way:
    """No new evidence: what each kind weighs, and the part of the map that the score is of, are
    those of 27 that set confirmed defects farthest apart from good images, in deviations of these.

    Args:
        share: how far the weights go from the served ones to these, 0..1; less than 1 keeps the
            part of the map.
    """

    def way(scene: Scene, confirmed: Confirmed) -> Scores:
        known = scene.goods[good].seen

        def scores(seen: Seen, weights_K: torch.Tensor, part: float) -> torch.Tensor:
            fused_BF = torch.einsum("k,bkf->bf", weights_K, seen.excess_BKF)
            maps_BSS = scene.rule.score_patches(fused_BF)[0].flatten(1)
            return top_mean(maps_BSS, max(1, round(part * maps_BSS.shape[1]))).sqrt()

        def apart(weights_K: torch.Tensor, part: float) -> float:
            good_B = scores(known, weights_K, part)
            distance = scores(confirmed.seen, weights_K, part).mean() - good_B.mean()
            return float(distance / good_B.std().clamp_min(_FAINTEST))

        served_K = scene.weights_K
        ways = [served_K]
        for kind in range(len(served_K)):
            for factor in (0.25, 4.0):
                changed_K = served_K.clone()
                changed_K[kind] *= factor
                ways.append(changed_K / changed_K.sum())
        parts = (TOP_SHARE / 3, TOP_SHARE, 3 * TOP_SHARE) if share == 1 else (TOP_SHARE,)
        best_K, part = max(
            ((weights_K, part) for weights_K in ways for part in parts), key=lambda one: apart(*one)
        )
        weights_K = torch.lerp(served_K, best_K, share)
        return scores(scene.tested, weights_K, part), scores(scene.left_out, weights_K, part)

    return way


def _log_ratio(seen: Seen, confirmed: Confirmed) -> torch.Tensor:
    """`(B, F)` of the distance to the memory to that to the nearest confirmed place."""
    places_XD = torch.cat(confirmed.places("looks_BFD"))
    to_defect_BF = torch.stack(
        [1 - (looks_FD @ places_XD.T).amax(1) for looks_FD in seen.looks_BFD]
    )
    return seen.distances_BF.clamp_min(_FAINTEST).log() - to_defect_BF.clamp_min(_FAINTEST).log()


def _directions(
    towards_DN: torch.Tensor, covariance_DD: torch.Tensor, *, metric: Metric
) -> torch.Tensor:
    """`(D, N)` that tell confirmed places, which lie so from the mean of good ones, from these."""
    variance_D = covariance_DD.diagonal()
    if metric == "diagonal":
        return towards_DN / (variance_D + _SHRINKAGE * variance_D.mean() + _FAINTEST)[:, None]
    if metric == "removed":
        value_D, vector_DD = torch.linalg.eigh(covariance_DD)
        share_D = value_D.flip(0).cumsum(0) / value_D.sum()
        removed_DC = vector_DD.flip(1)[:, : int((share_D < _REMOVED).sum()) + 1]
        return towards_DN - removed_DC @ (removed_DC.T @ towards_DN)
    return torch.linalg.solve(_shrunk(covariance_DD), towards_DN)


def _shrunk(covariance_DD: torch.Tensor) -> torch.Tensor:
    shrunk_DD = (1 - _SHRINKAGE) * covariance_DD
    shrunk_DD.diagonal().add_(_SHRINKAGE * covariance_DD.diagonal().mean() + _FAINTEST)
    return shrunk_DD


def _excess(
    of_good: torch.Tensor, *, highest: bool | Literal["usual"]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What is above the mean of good values, or above the highest, squared as evidence is."""
    if highest == "usual":
        floor = of_good.amax(1).mean()
    else:
        floor = of_good.max() if highest else of_good.mean()
    span = MOST_EVIDENCE * of_good.std().clamp_min(_FAINTEST)
    return lambda values: ((values - floor) / span).clamp(0, 1).square()


_LEFT_OVER = discriminant("left_over_BFD", good="altered", crossed=True)
_ABOVE = discriminant("left_over_BFD", good="altered", crossed=True, highest=True)
_DIAGONAL = discriminant("looks_BFD", metric="diagonal", good="altered", crossed=True)
_FURTHER = discriminant("left_over_BFD", good="further", crossed=True)

WAYS: Mapping[str, Way] = {
    # Heads, each measured by the left-out support images.
    "log ratio": joined(ratio()),
    "log ratio, above the highest": joined(ratio(highest=True)),
    "diagonal": joined(discriminant("looks_BFD", metric="diagonal")),
    "diagonal, above the highest": joined(
        discriminant("looks_BFD", metric="diagonal", highest=True)
    ),
    "left over": joined(discriminant("left_over_BFD")),
    "left over, above the highest": joined(discriminant("left_over_BFD", highest=True)),
    # More good material, and heads measured by what they did not learn from.
    "left over, crossed": joined(discriminant("left_over_BFD", crossed=True)),
    "left over, altered copies": joined(_LEFT_OVER),
    "left over, altered copies, weight 0.2": joined(_LEFT_OVER, weight=0.2),
    "left over, turned copies": joined(discriminant("left_over_BFD", good="turned", crossed=True)),
    "left over, outside of masks": joined(
        discriminant("left_over_BFD", good="altered", crossed=True, masks=True)
    ),
    "left over, directions removed": joined(
        discriminant("left_over_BFD", metric="removed", good="altered", crossed=True)
    ),
    "left over, a direction a defect": joined(
        discriminant("left_over_BFD", good="altered", crossed=True, each=True)
    ),
    "left over, further good images": joined(_FURTHER),
    # The same, above the highest place of good images.
    "left over, altered copies, above the highest": joined(_ABOVE),
    "left over, altered copies, above the highest, weight 1": joined(_ABOVE, weight=1.0),
    "left over, altered copies, above the usual highest": joined(
        discriminant("left_over_BFD", good="altered", crossed=True, highest="usual")
    ),
    "left over, turned copies, above the highest": joined(
        discriminant("left_over_BFD", good="turned", crossed=True, highest=True)
    ),
    "left over, further good images, above the highest": joined(
        discriminant("left_over_BFD", good="further", crossed=True, highest=True)
    ),
    "log ratio, altered copies, above the highest": joined(ratio(good="altered", highest=True)),
    "diagonal, altered copies, above the highest": joined(
        discriminant("looks_BFD", metric="diagonal", good="altered", crossed=True, highest=True)
    ),
    # Gates.
    "left over, if proven": joined(proven(_LEFT_OVER)),
    "left over, if harmless": joined(harmless(_LEFT_OVER)),
    "left over, further good images, if proven": joined(proven(_FURTHER)),
    "log ratio, if proven": joined(proven(ratio(good="altered"))),
    "diagonal, if proven": joined(proven(_DIAGONAL)),
    # Near confirmed defects alone.
    "left over, where alike": joined(alike(_LEFT_OVER)),
    "near in look": joined(near("looks_BFD")),
    "near in what is left over": joined(near("left_over_BFD")),
    "near in what is left over, agreed": joined(near("left_over_BFD", agreed=True)),
    "second look": second_look(),
    # No new evidence.
    "reweighted": reweighted(share=1.0),
    "reweighted by half": reweighted(share=0.5),
    # Controls, for which no defect is confirmed.
    "control: unusual, altered copies, above the highest": joined(unusual()),
    "control: further good images in the memory": enlarged,
}
"""By name."""

OF_KINDS = (
    "log ratio",
    "diagonal",
    "left over",
    "left over, altered copies",
    "left over, altered copies, above the highest",
    "left over, if proven",
    "left over, where alike",
)
"""Ways that are asked whether defects of another kind lose."""
