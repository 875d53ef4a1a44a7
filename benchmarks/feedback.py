"""What feedback is worth, and what wrong one costs: `python -m benchmarks.feedback --data DIR`.

Each category is fitted to four images for each seed. The test images are halved at random: people
say what those of the one half are, the other half is measured, and no image is in both.

The first table lets the good ones that score highest join the memory, 1, 2, 4 or 8 of them, or, as
`wrong`, defective ones: what a mistaken or malicious person could do. The threshold `follows` the
left-out support images, or is `kept`.

The second is what the fleet does. All rejected parts of the first half are labelled, and what was
called good joins, eight at most, the lowest scores first, held against 16 parts that were called
defective, or against nothing. One label in ten is `flipped`; or one `client` calls eight rejected
defects false alarms, beside those of the others, or alone. `joined` says how many good and
defective ones joined.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from apt_ray.auroc import auroc
from apt_ray.data.feedback import MOST_AT_ONCE
from apt_ray.data.folders import Category, find_categories
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.features.clip import load_backbone
from apt_ray.features.protocol import Backbone, ImageFeatures
from apt_ray.images import read_image
from apt_ray.prompts.accept import LeftOut, accept_features
from apt_ray.prompts.fit import fit
from apt_ray.tables import markdown
from benchmarks.rows import Row, compared, write_rows

_ACCEPTED = (1, 2, 4, 8)
_WRONG = (1, 4, 8)
_FLIPPED = 0.1
_GATE = 16
_AGAINST = {0: "no gate", _GATE: f"{_GATE} defects"}

Outcome = dict[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A category that was fitted with one seed, and its test images in two halves.

    Attributes:
        features: of all test images.
        is_bad: (B,) bool of them.
        given, measured: the places of the two halves.
        seed: of the halves and of the labels.
    """

    backbone: Backbone
    fitted: PromptSet
    features: ImageFeatures
    is_bad: np.ndarray[tuple[int], np.dtype[np.bool_]]
    given: Sequence[int]
    measured: Sequence[int]
    seed: int

    @classmethod
    def of(
        cls, category: Category, backbone: Backbone, features: ImageFeatures, seed: int
    ) -> "Case":
        is_bad = np.array([image.is_anomalous for image in category.test])
        order = list(range(len(is_bad)))
        random.Random(seed).shuffle(order)
        return cls(
            backbone=backbone,
            fitted=fit(category.name, category.support_set(4, seed=seed), backbone=backbone),
            features=features,
            is_bad=is_bad,
            given=order[: len(order) // 2],
            measured=order[len(order) // 2 :],
            seed=seed,
        )

    @cached_property
    def scores(self) -> list[float]:
        """Of all test images, as fitted."""
        scored = Detector(self.backbone, self.fitted).score(self.features)[1]
        return [float(score) for score in scored]

    @cached_property
    def left_out(self) -> LeftOut:
        return LeftOut.of(self.fitted, self.backbone)

    def after(self, alarms: Sequence[int] = (), defects: Sequence[int] | None = None) -> Outcome:
        """What the other half says once images have joined, held against defects; all of them join
        if there is no gate (None)."""
        accepted = accept_features(
            self.fitted,
            self._of(alarms),
            self.backbone,
            defects=self._of(defects or ()),
            force=defects is None,
            left_out=self.left_out,
        )
        scores_B = Detector(self.backbone, accepted.prompt_set).score(self._of(self.measured))[1]
        scores, is_bad = scores_B.numpy(), self.is_bad[self.measured]
        rejected = scores > accepted.prompt_set.threshold.value
        kept = scores > self.fitted.threshold.value
        joined = self.is_bad[[alarms[place] for place in accepted.joined]]
        return {
            "auroc": 100 * auroc(np.sort(scores[~is_bad]), scores[is_bad]),
            "alarms": 100 * float(rejected[~is_bad].mean()),
            "misses": 100 * float((~rejected[is_bad]).mean()),
            "alarms, kept": 100 * float(kept[~is_bad].mean()),
            "misses, kept": 100 * float((~kept[is_bad]).mean()),
            "good": float((~joined).sum()),
            "bad": float(joined.sum()),
        }

    def highest(self, count: int, *, bad: bool) -> Outcome:
        """Those of the first half that score highest join."""
        some = [place for place in self.given if self.is_bad[place] == bad]
        return self.after(sorted(some, key=lambda place: -self.scores[place])[:count])

    def labelled(self, gate: int, *, flipped: float, highest_first: bool = False) -> Outcome:
        """All of the first half are labelled, a share of them wrongly."""
        draws = random.Random(1000 + self.seed)
        said_bad = {p: bool(self.is_bad[p]) != (draws.random() < flipped) for p in self.given}
        alarms = [place for place in self.given if self._is_rejected(place) and not said_bad[place]]
        defects = [place for place in self.given if said_bad[place]]
        return self._as_the_fleet_does(alarms, defects, gate, draws, highest_first=highest_first)

    def malicious(self, gate: int, *, alone: bool) -> Outcome:
        """One client calls rejected defects false alarms."""
        draws = random.Random(2000 + self.seed)
        bad = [place for place in self.given if self.is_bad[place] and self._is_rejected(place)]
        theirs = draws.sample(bad, min(MOST_AT_ONCE, len(bad)))
        others = [p for p in self.given if self._is_rejected(p) and not self.is_bad[p]]
        defects = [place for place in self.given if self.is_bad[place] and place not in theirs]
        return self._as_the_fleet_does(theirs + (0 if alone else 1) * others, defects, gate, draws)

    def _as_the_fleet_does(
        self,
        alarms: list[int],
        defects: list[int],
        gate: int,
        draws: random.Random,
        *,
        highest_first: bool = False,
    ) -> Outcome:
        alarms = sorted(alarms, key=lambda place: self.scores[place], reverse=highest_first)
        alarms = alarms[:MOST_AT_ONCE]
        watched = draws.sample(defects, min(gate, len(defects)))
        return self.after(alarms, watched if gate else None)

    def _is_rejected(self, place: int) -> bool:
        return self.fitted.threshold.rejects(self.scores[place])

    def _of(self, places: Sequence[int]) -> ImageFeatures | None:
        return self.features[list(places)] if places else None


def main() -> None:
    """Print both tables, mean over seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    found: dict[str, dict[str, Outcome]] = {}
    for category in find_categories(options.data):
        found[category.name] = _measured(category, options.seeds)
        print(category.name, "measured", flush=True)
    names = list(found)
    situations = list(found[names[0]])
    header = ("", *names, "mean of all")
    joins = [name for name in situations if name.startswith(("none", "right", "wrong"))]
    others = [name for name in situations if name not in joins]
    for threshold, suffix in (("follows", ""), ("is kept", ", kept")):
        print(
            f"\nThe threshold {threshold}: image AUROC / good parts rejected / defects passed, %\n"
        )
        print(markdown(header, [[each, *_cells(found, each, suffix)] for each in joins]))
    print("\nAs the fleet does: the same, and good and defective images that joined\n")
    print(markdown(header, [[each, *_cells(found, each, "", joined=True)] for each in others]))
    rows: list[Row] = []
    for name in names:
        fitted = found[name]["none"]
        for each in situations[1:]:
            title, now = f"{name}, {each}: ", found[name][each]
            rows += [
                compared(
                    f"{title}image AUROC", now["auroc"], fitted["auroc"], "%", more_is_better=True
                ),
                compared(f"{title}misses", now["misses"], fitted["misses"], "%"),
            ]
    write_rows(rows, options.json)


@torch.inference_mode()
def _encoded(category: Category, backbone: Backbone) -> ImageFeatures:
    images = [read_image(image.path) for image in category.test]
    return backbone.encode_in_batches(backbone.preprocess(images))


def _measured(category: Category, seeds: Sequence[int]) -> dict[str, Outcome]:
    """Situation -> outcome, mean over seeds."""
    backbone = load_backbone()
    features = _encoded(category, backbone)
    cases = [Case.of(category, backbone, features, seed) for seed in seeds]
    each = [_outcomes(case) for case in cases]
    return {
        name: {key: fmean(outcomes[name][key] for outcomes in each) for key in each[0][name]}
        for name in each[0]
    }


@torch.inference_mode()
def _outcomes(case: Case) -> dict[str, Outcome]:
    """Situation -> outcome."""
    asked: dict[str, Callable[[Case], Outcome]] = {"none": Case.after}
    for count in _ACCEPTED:
        asked[f"right, {count}"] = partial(Case.highest, count=count, bad=False)
    for count in _WRONG:
        asked[f"wrong, {count}"] = partial(Case.highest, count=count, bad=True)
    asked[f"labelled, {_AGAINST[_GATE]}"] = partial(Case.labelled, gate=_GATE, flipped=0.0)
    asked[f"flipped, highest first, {_AGAINST[_GATE]}"] = partial(
        Case.labelled, gate=_GATE, flipped=_FLIPPED, highest_first=True
    )
    for gate, against in _AGAINST.items():
        asked[f"flipped, {against}"] = partial(Case.labelled, gate=gate, flipped=_FLIPPED)
        asked[f"client among others, {against}"] = partial(Case.malicious, gate=gate, alone=False)
        asked[f"client alone, {against}"] = partial(Case.malicious, gate=gate, alone=True)
    return {name: ask(case) for name, ask in asked.items()}


def _cells(
    found: dict[str, dict[str, Outcome]], situation: str, suffix: str, *, joined: bool = False
) -> list[str]:
    """A cell for each category, and one of their mean."""
    outcomes = [categories[situation] for categories in found.values()]
    mean = {key: fmean(outcome[key] for outcome in outcomes) for key in outcomes[0]}
    return [
        f"{each['auroc']:.1f} / {each[f'alarms{suffix}']:.1f} / {each[f'misses{suffix}']:.1f}"
        + (f" ({each['good']:.1f} + {each['bad']:.1f})" if joined else "")
        for each in (*outcomes, mean)
    ]


if __name__ == "__main__":
    main()
