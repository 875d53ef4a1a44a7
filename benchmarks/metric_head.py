"""Whether confirmed defects help to find more: `python -m benchmarks.metric_head --data DIR`.

Each category is fitted to four images for each seed. Of 1, 2, 4 or 8 confirmed defects, with their
masks where there are any, heads learn (`benchmarks.heads`) whose evidence joins the score. At most
60 good and 60 defective images of a category are tested, the same for all seeds, of every kind
alike; confirmed defects are drawn from the others, twice a seed: fewer are a part of more. The
threshold follows the left-out support images, as in a fit.

The first tables hold the difference to what is served in the mean of all categories, with a paired
95 % interval over images, drawn kind by kind, and seeds; and by category. Equal false alarms are as
many as what is served rejects of the good test images. In the last tables all confirmed defects are
of one kind, each kind in turn: what defects of this kind gain, and what those of the others do.

Scores are kept in FILE as they are measured: the same command goes on where it was stopped.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isqrt
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
from numpy.typing import NDArray

from apt_ray.anomalies.families import harmless_copies
from apt_ray.config import FitSettings
from apt_ray.data.folders import GOOD, Category, Defect, find_categories
from apt_ray.detection.calibration import SPREAD
from apt_ray.detection.detector import Detector
from apt_ray.detection.kinds import look
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.detection.reference import ReferenceMemory, are_directions
from apt_ray.detection.rule import ScoreRule, anomalous_log_odds, enlarge
from apt_ray.errors import DataError
from apt_ray.features.clip import load_backbone
from apt_ray.features.protocol import Backbone, ImageFeatures
from apt_ray.files import Location, write_json
from apt_ray.images import find_reading, read_image
from apt_ray.prompts.confirm import map_of
from apt_ray.prompts.fit import fit
from apt_ray.prompts.remember import show
from apt_ray.tables import markdown
from apt_ray.validation.evaluation import TestSet
from apt_ray.validation.intervals import (
    Floats,
    change_over_seeds,
    draw_weights,
    image_aurocs,
)
from benchmarks.baselines.descriptors import as_maps, descriptors, side_by_side
from benchmarks.heads import (
    OF_KINDS,
    WAYS,
    Confirmed,
    Good,
    Scene,
    Scores,
    Seen,
    defect_places,
    outside,
)

SERVED = "what is served"
_SHOTS = 4
_COPIES = 4
_DRAWS = 2
_ALL = "all kinds"
_OF = ("same", "other")

FIGURES = ("image AUROC", "equal", "at 5 %", "at 10 %", "rejected", "found")
"""Image AUROC; defects found at equal false alarms, at 5 % and at 10 % of them; good images
rejected and defects found at the threshold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is measured.

    Attributes:
        counts: confirmed defects, ascending.
        tested: good, and defective, test images of a category at most.
        further: good images beyond the support images, for the ways that ask for them.
        split: seed by which the images that are tested are drawn.
        ways: those of `benchmarks.heads.WAYS` that are asked.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    counts: tuple[int, ...] = (1, 2, 4, 8)
    tested: int = 60
    further: int = 16
    split: int = 0
    ways: tuple[str, ...] = tuple(WAYS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """What one way says of the test images of a category.

    Attributes:
        of: kind of the confirmed defects, or `all kinds`.
        count: confirmed defects; 0 for what is served.
        threshold: above which an image is rejected.
        scores: of each test image.
    """

    category: str
    seed: int
    draw: int
    of: str
    count: int
    way: str
    threshold: float
    scores: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """All that was measured.

    Attributes:
        plan: how.
        kinds: category -> test image -> its kind.
    """

    plan: Plan
    kinds: dict[str, dict[str, str]]
    scored: list[Scored]

    @classmethod
    def read(cls, file: Path | None, plan: Plan) -> "Found":
        """What an earlier run left; DataError if it is something else."""
        if file is None or not file.exists():
            return cls(plan=plan, kinds={}, scored=[])
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            before = Plan(**{name: _tuple(value) for name, value in held["plan"].items()})
            scored = [Scored(**each) for each in held["scored"]]
            kinds = held["kinds"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{file} is not what this benchmark wrote ({error}): give another --json FILE"
            ) from error
        if before != plan:
            raise DataError(f"{file} was made by another plan ({before}): give another --json FILE")
        return cls(plan=plan, kinds=kinds, scored=scored)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--categories", nargs="*", default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=Plan().seeds)
    parser.add_argument("--split", type=int, default=0, help="draws other test images (0)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=Plan().ways, metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    categories = find_categories(options.data, options.categories or ())
    plan = Plan(seeds=tuple(options.seeds), split=options.split, ways=tuple(options.ways))
    found = Found.read(options.json, plan)
    backbone = load_backbone()
    for category in categories:
        for _ in measure(category, backbone, found):
            if options.json:
                write_json(options.json, asdict(found))
    print(report(found))


def measure(
    category: Category, backbone: Backbone, found: Found, settings: FitSettings | None = None
) -> Iterator[int]:
    """Add what is not yet there of a category, seed by seed, which are given as they are done.

    Raises:
        DataError: it has too few images of one kind.
    """
    plan, name = found.plan, category.name
    done = {each.seed for each in found.scored if each.category == name}
    if done.issuperset(plan.seeds):
        return
    draws = {seed: category.draw(_SHOTS, seed, calibration=plan.further) for seed in plan.seeds}
    support = list(dict.fromkeys(path for drawn in draws.values() for path in drawn.support))
    learned = {path for drawn in draws.values() for path in (*drawn.support, *drawn.calibration)}
    test = TestSet.read(category, find_reading(support))
    tested, spare = _split(category, test.held_out(learned)[0], plan)
    found.kinds[name] = {
        category.name_of(category.test[place].path): category.test[place].defect_type
        for place in tested
    }
    with torch.no_grad():
        features = test.encode(backbone, lambda _what, _done, _total: None)
    for seed in (seed for seed in plan.seeds if seed not in done):
        drawn = draws[seed]
        chosen = FitSettings.parse({**(settings or FitSettings()).model_dump(), "seed": seed})
        prompt_set = fit(name, drawn.support, chosen, backbone=backbone, reading=test.reading)
        with torch.no_grad():
            fitted = Fitted(backbone, prompt_set, drawn.support)
            scene = fitted.scene(features[tested], drawn.calibration)
            for draw, of, places in _drawn(spare, seed, plan.counts[-1]):
                confirmed = fitted.confirm(test, features, places)
                for count, way, scores in _asked(scene, confirmed, plan, of):
                    found.scored.append(
                        Scored(
                            category=name,
                            seed=seed,
                            draw=draw,
                            of=of,
                            count=count,
                            way=way,
                            threshold=median(scores[1].tolist()) + SPREAD,
                            scores=[round(score, 6) for score in scores[0].tolist()],
                        )
                    )
        yield seed


def _drawn(
    spare: Mapping[str, Sequence[int]], seed: int, count: int
) -> Iterator[tuple[int, str, list[int]]]:
    """Number of a draw, kind of the defects, their places: all kinds together, then each alone."""
    everything = [place for places in spare.values() for place in places]
    for draw in range(_DRAWS):
        yield draw, _ALL, random.Random(f"{seed} {draw}").sample(everything, count)
    for kind, places in spare.items() if len(spare) > 1 else ():
        yield 0, kind, random.Random(f"{seed} {kind}").sample(places, count)


def _asked(
    scene: Scene, confirmed: Confirmed, plan: Plan, of: str
) -> Iterator[tuple[int, str, Scores]]:
    """Number of confirmed defects, way, scores; what is served at first."""
    yield 0, SERVED, scene.served
    for count in plan.counts:
        some = confirmed[list(range(count))]
        for way in plan.ways:
            if of == _ALL or way in OF_KINDS:
                yield count, way, WAYS[way](scene, some)


def _split(
    category: Category, kept: Sequence[int], plan: Plan
) -> tuple[list[int], dict[str, list[int]]]:
    """The places of the images that are tested, and, kind by kind, of those to be confirmed."""
    by_kind: dict[str, list[int]] = defaultdict(list)
    good: list[int] = []
    for place in kept:
        image = category.test[place]
        (by_kind[image.defect_type] if image.is_anomalous else good).append(place)
    g = random.Random(plan.split)
    g.shuffle(good)
    tested, spare = good[: plan.tested], {}
    least = _DRAWS * plan.counts[-1]
    for kind, places in by_kind.items():
        if len(places) <= least:
            raise DataError(
                f"category {category.name} has {len(places)} test images of {kind}: {least} are"
                f" confirmed and others tested, so give more, or another category"
            )
        g.shuffle(places)
        count = min(plan.tested // len(by_kind), len(places) - least)
        tested += places[:count]
        spare[kind] = places[count:]
    return sorted(tested), spare


class Fitted:
    """A prompt set, and all that heads look at in images.

    Args:
        support: the files that it was fitted to.
    """

    def __init__(
        self, backbone: Backbone, prompt_set: PromptSet, support: Sequence[Location]
    ) -> None:
        self._backbone, self._set = backbone, prompt_set
        self._detector = Detector(backbone, prompt_set)
        self._rule = ScoreRule.of(backbone, prompt_set.settings)
        self._pixels_S3HW = self._read(support)
        features = backbone.encode_in_batches(self._pixels_S3HW)
        self._shown = show(features, self._pixels_S3HW, backbone, prompt_set.settings)
        self._without = [self._shown.memory(without=source) for source in range(len(features))]
        alone = [features[[source]] for source in range(len(features))]
        rests = [_rest(*pair) for pair in zip(alone, self._without, strict=True)]
        self._lengths = {
            layer: float(torch.cat([rest[layer] for rest in rests]).norm(dim=-1).mean())
            for layer in rests[0]
        }
        self._left_out = [self.see(*pair) for pair in zip(alone, self._without, strict=True)]

    def scene(self, tested: ImageFeatures, further: Sequence[Location]) -> Scene:
        """What heads are measured on: features of the test images, files of further good ones."""
        g = torch.Generator().manual_seed(self._set.settings.seed + 1)  # others than in the memory
        copies = [harmless_copies(self._pixels_S3HW, 1, g) for _ in range(_COPIES)]
        goods = {
            "left out": self._good([]),
            "altered": self._good(copies),
            "turned": self._good(_turned(self._pixels_S3HW)),
        }
        encoded = self._backbone.encode_in_batches(self._read(further))
        sources = len(self._without)
        goods["further"] = Good(
            Seen.joined([*self._left_out, self.see(encoded, self._set.memory)]),
            torch.tensor([*range(sources), *(one % sources for one in range(len(further)))]),
        )
        shown = ImageFeatures.concatenate([*self._shown.parts, encoded])
        return Scene(
            rule=self._rule,
            threshold=self._set.threshold.value,
            goods=goods,
            tested=self.see(tested, self._set.memory),
            remembered=self.see(tested, ReferenceMemory.of(shown, self._shown.size)),
        )

    def confirm(self, test: TestSet, features: ImageFeatures, places: Sequence[int]) -> Confirmed:
        """The test images in these places as confirmed defects."""
        seen = self.see(features[list(places)], self._set.memory)
        where, looks, clear = [], [], []
        count = seen.looks_BFD.shape[1]
        for place in places:
            image, own = test.category.test[place], features[[place]]
            defect = Defect(path=image.path, kind=image.defect_type, mask=image.mask)
            _, map_SS = map_of(self._detector, own, defect, test.sizes[place])
            where.append(defect_places(map_SS, count))
            looks.append(look(own, map_SS[None])[0])
            none_F = torch.zeros(count, dtype=torch.bool)
            clear.append(none_F if test.masks is None else outside(test.masks[place], count))
        return Confirmed(
            seen=replace(seen, peaks_BD=torch.stack(looks)),
            where=tuple(where),
            outside_NF=torch.stack(clear),
        )

    def see(self, features: ImageFeatures, memory: ReferenceMemory) -> Seen:
        """Images in front of a memory."""
        odds_BN = anomalous_log_odds(
            features.tokens_BNE, self._set.text_features, self._backbone.constants
        )
        distances = memory.distances(features)
        scales = self._set.provenance.scales
        prompts_BF, layers_LBF = self._rule.excesses(odds_BN, distances, scales)
        maps_BSS, _ = self._rule.score_evidence(odds_BN, distances, scales)
        rest = _rest(features, memory)
        left_over = [as_maps(rest[layer] / self._lengths[layer]) for layer in sorted(rest)]
        looks_BFD = descriptors(features)
        side = isqrt(looks_BFD.shape[1])
        directed = [
            enlarge(distances[layer], (isqrt(tokens.shape[1]),) * 2, (side, side))
            for layer, tokens in features.layers.items()
            if are_directions(tokens.flatten(0, 1))
        ]
        return Seen(
            excess_BKF=torch.cat([prompts_BF[None], layers_LBF]).transpose(0, 1),
            looks_BFD=looks_BFD,
            left_over_BFD=side_by_side(left_over),
            distances_BF=torch.stack(directed).mean(0),
            peaks_BD=look(features, maps_BSS),
        )

    def _read(self, files: Sequence[Location]) -> torch.Tensor:
        return self._backbone.preprocess([read_image(file, self._set.reading) for file in files])

    def _good(self, copies: Sequence[torch.Tensor]) -> Good:
        """The left-out support images, and copies of each behind them."""
        parts, sources = [*self._left_out], [*range(len(self._left_out))]
        for copy_S3HW in copies:
            encoded = self._backbone.encode_in_batches(copy_S3HW)
            for source, memory in enumerate(self._without):
                parts.append(self.see(encoded[[source]], memory))
                sources.append(source)
        return Good(Seen.joined(parts), torch.tensor(sources))


def _rest(features: ImageFeatures, memory: ReferenceMemory) -> dict[int, torch.Tensor]:
    """Reference layer -> what is left of places after the nearest in memory, `(B, M_l, D_l)`."""
    rest = {}
    for layer, tokens_BMD in features.layers.items():
        memory_KD = memory.layers[layer].float()
        offset_K = torch.zeros(len(memory_KD))
        if not are_directions(memory_KD):
            offset_K = -memory_KD.square().sum(1) / 2
        rest[layer] = torch.stack(
            [x_MD - memory_KD[(x_MD @ memory_KD.T + offset_K).argmax(1)] for x_MD in tokens_BMD]
        )
    return rest


def _turned(pixels_B3HW: torch.Tensor) -> list[torch.Tensor]:
    """The seven other ways in which a square can lie."""
    ways = [
        torch.rot90(pixels, quarters, (2, 3))
        for pixels in (pixels_B3HW, pixels_B3HW.flip(3))
        for quarters in range(4)
    ]
    return ways[1:]


Values = dict[str, Floats]
"""Figure -> its value on all test images, then on R resamples of them, `(1 + R,)`."""


def values(
    scored: Scored, served: Scored, is_bad_I: NDArray[np.bool_], weight_RI: Floats
) -> Values:
    """The figures of a way; weights that are 0 leave images out."""
    score_I = np.array(scored.scores)
    good_I, bad_RI = ~is_bad_I, weight_RI[:, is_bad_I]
    good_RI = weight_RI[:, good_I]

    def share(where_I: NDArray[np.bool_], weights: Floats, own_I: NDArray[np.bool_]) -> Floats:
        result: Floats = (weights * where_I[own_I]).sum(1) / weights.sum(1)
        return result

    order = np.argsort(-score_I[good_I])
    highest_G = np.append(score_I[good_I][order], -np.inf)
    above_RG = good_RI[:, order].cumsum(1)

    def found(alarms_R: Floats) -> Floats:
        """At the lowest threshold that rejects no more good images than so many."""
        limit_R1 = highest_G[(above_RG <= alarms_R[:, None]).sum(1)][:, None]
        result: Floats = (bad_RI * (score_I[is_bad_I] > limit_R1)).sum(1) / bad_RI.sum(1)
        return result

    rejected_I = score_I > scored.threshold
    alarms_RG = good_RI * (np.array(served.scores)[good_I] > served.threshold)
    total_R = good_RI.sum(1)
    return {
        "image AUROC": image_aurocs(score_I, is_bad_I, weight_RI),
        "equal": found(alarms_RG.sum(1)),
        "at 5 %": found(np.floor(0.05 * total_R)),
        "at 10 %": found(np.floor(0.1 * total_R)),
        "rejected": share(rejected_I, good_RI, good_I),
        "found": share(rejected_I, bad_RI, is_bad_I),
    }


class Measured:
    """A category's figures.

    Attributes:
        kinds: of defects, if there are several.
    """

    def __init__(self, found: Found, category: str) -> None:
        kinds_I = np.array([*found.kinds[category].values()])
        self._is_bad_I = kinds_I != GOOD
        self._kinds_I = kinds_I
        self._weight_RI = draw_weights(kinds_I)
        self._seeds = found.plan.seeds
        self._scored: dict[tuple[int, str, str, int], list[Scored]] = defaultdict(list)
        for each in found.scored:
            if each.category == category:
                self._scored[each.seed, each.way, each.of, each.count].append(each)
        of = {each.of for each in found.scored if each.category == category}
        self.kinds = sorted(of - {_ALL})
        self._known: dict[tuple[str, int, str], tuple[list[Values], list[Values]]] = {}

    def pair(self, way: str, count: int, of: str) -> tuple[list[Values], list[Values]]:
        """For each seed, what is served and a way: of defects of all kinds (`all kinds`), or where
        one kind was confirmed of the `same` and of `other` kinds, mean over the confirmed."""
        key = way, count, of
        if key not in self._known:
            both = [self._of_seed(seed, *key) for seed in self._seeds]
            self._known[key] = [before for before, _ in both], [after for _, after in both]
        return self._known[key]

    def _of_seed(self, seed: int, way: str, count: int, of: str) -> tuple[Values, Values]:
        served = self._scored[seed, SERVED, _ALL, 0][0]
        before, after = [], []
        for kind in [_ALL] if of == _ALL else self.kinds:
            is_own_I = self._kinds_I == kind
            left_out_I = np.zeros_like(is_own_I)
            if of != _ALL:
                left_out_I = self._is_bad_I & (is_own_I if of == "other" else ~is_own_I)
            weight_RI = self._weight_RI * ~left_out_I
            before.append(values(served, served, self._is_bad_I, weight_RI))
            after += [
                values(each, served, self._is_bad_I, weight_RI)
                for each in self._scored[seed, way, kind, count]
            ]
        return _mean(before), _mean(after)


def report(found: Found) -> str:
    """All tables, as Markdown, in percent and points."""
    measured = {name: Measured(found, name) for name in found.kinds}
    everything, most = list(measured.values()), found.plan.counts[-1]
    served = [each.pair(SERVED, 0, _ALL)[0] for each in everything]
    rows = []
    for figure in FIGURES:
        own = [100 * fmean(one[figure][0] for one in seeds) for seeds in served]
        rows.append((figure, *(f"{value:.1f}" for value in (*own, fmean(own)))))
    parts = [markdown((SERVED, *measured, "mean of all"), rows)]
    ways = found.plan.ways
    for count in found.plan.counts:
        parts.append(f"{count} confirmed, mean of all categories, points over what is served:")
        rows = [
            (way, *(change(everything, way, count, figure) for figure in FIGURES)) for way in ways
        ]
        parts.append(markdown(("way", *FIGURES), rows))
    for figure in FIGURES[:4]:
        parts.append(f"{most} confirmed, by category, {figure}:")
        rows = [(way, *(change([each], way, most, figure) for each in everything)) for way in ways]
        parts.append(markdown(("way", *measured), rows))
    several = {name: [each] for name, each in measured.items() if each.kinds}
    if several:
        several["both"] = [each for (each,) in several.values()]
    columns = [(figure, of) for figure in ("image AUROC", "equal", "at 10 %") for of in _OF]
    for name, some in several.items():
        parts.append(f"{name}, all confirmed defects of one kind, each kind in turn:")
        rows = [
            (way, str(count), *(change(some, way, count, *column) for column in columns))
            for way in ways
            if way in OF_KINDS
            for count in found.plan.counts
        ]
        header = ("way", "confirmed", *(f"{figure}, {of}" for figure, of in columns))
        parts.append(markdown(header, rows))
    return "\n\n".join(parts)


def change(
    categories: Sequence[Measured], way: str, count: int, figure: str, of: str = _ALL
) -> str:
    """A way less what is served, in points, with its 95 % interval."""
    pairs = [each.pair(way, count, of) for each in categories]
    before, after = ([[one[figure] for one in pair[side]] for pair in pairs] for side in (0, 1))
    found = change_over_seeds(before, after)
    points = (100 * (value + 0.0) for value in (found.after - found.before, found.low, found.high))
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*points)


def _mean(several: Sequence[Values]) -> Values:
    return {figure: np.mean([each[figure] for each in several], axis=0) for figure in FIGURES}


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
