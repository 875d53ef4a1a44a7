"""Is a search worth its hours? `python -m benchmarks.search_worth --data DIR`.

DIR holds labelled categories. Settings are drawn as a random search draws them, the defaults first.
Each has its validation value, which the search sees, and its test AUROC, which the search never
sees: test images judge the method here and choose nothing. Told are

- Spearman's rank correlation of the two, by category, over all settings;
- the gain of the winner, chosen as a search chooses it, over the defaults and over a setting drawn
  at random, and the share of the best possible gain that it catches;
- the same where the winner of a category is chosen with the values of the other categories beside
  its own, each category left out in turn (`prior`).

A support set (a category and a seed) is finished at a time, and kept in `--out FILE`: the same
command goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from tqdm import tqdm

from apt_ray import find_categories, load_backbone
from apt_ray.anomalies.bank import encode_support
from apt_ray.cli.flags import integers
from apt_ray.config import BackboneSpec
from apt_ray.data.folders import Category
from apt_ray.detection.rule import Scale, Scales, ScoreRule, anomalous_log_odds
from apt_ray.features.protocol import Backbone, ImageFeatures
from apt_ray.files import write_json
from apt_ray.images import read_image
from apt_ray.prompts.lanes import Lane, folds
from apt_ray.prompts.remember import remember
from apt_ray.prompts.trainer import PromptTrainer
from apt_ray.tables import markdown
from apt_ray.validation.evaluation import TestSet
from apt_ray.validation.judge import Judge, encode_judge
from apt_ray.validation.metrics import image_auroc
from apt_ray.validation.synthetic import judge_folds
from benchmarks.common import drawn
from tuning.records import TrialRecord
from tuning.results import choose_winner
from tuning.settings import SearchSettings
from tuning.space import starting_point

optuna.logging.set_verbosity(optuna.logging.WARNING)

Floats = NDArray[np.float64]

_BATCH = 16
_RESAMPLES = 500


def main() -> None:
    """Measure what `--out` lacks, and print the tables."""
    options = _parser().parse_args()
    settings = SearchSettings(shots=options.shots, steps=options.steps)
    points = drawn(
        settings.space, options.trials, first=starting_point(settings.space, settings.backbone)
    )
    done: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    if done.setdefault("settings", points) != points:
        raise SystemExit(f"{options.out} holds other settings: give another --out")
    categories = find_categories(options.data)
    runs = len(categories) * len(options.seeds)
    with tqdm(total=runs, desc="support sets", dynamic_ncols=True) as bar:
        for category in categories:
            missing = [seed for seed in options.seeds if f"{category.name}/{seed}" not in done]
            bar.update(len(options.seeds) - len(missing))
            if not missing:
                continue
            bar.set_postfix_str(category.name)
            measured = _Category(category, settings)
            for seed in missing:
                done[f"{category.name}/{seed}"] = measured.run(seed, points)
                write_json(options.out, done)
                bar.update()
    print(report([category.name for category in categories], options.seeds, done))


class _Category:
    """A category whose test images are encoded once for each of the reference encoder's settings.

    Args:
        category: labelled.
        settings: of the search.
    """

    def __init__(self, category: Category, settings: SearchSettings) -> None:
        self._category, self._settings = category, settings
        self._backbone = load_backbone(settings.backbone)
        self._seen: dict[BackboneSpec, Backbone] = {
            spec: load_backbone(spec) for spec in settings.judging()
        }
        test = TestSet.read(category)
        self._is_anomalous = [image.is_anomalous for image in category.test]
        self._test: dict[BackboneSpec, ImageFeatures] = {
            spec: test.encode(backbone, lambda *_: None) for spec, backbone in self._seen.items()
        }

    def run(self, seed: int, points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Value, values of the judged images and test AUROC of all settings on one support set."""
        chosen = self._settings.model_copy(update={"support_seeds": (seed,)})
        support = self._category.support_set(chosen.shots, seed)
        images = [read_image(path) for path in support]
        fits = [chosen.fit_settings(point) for point in points]
        ((spec, _),) = chosen.bank_specs([support], fingerprint=self._backbone.fingerprint)
        bank = encode_support(self._backbone, images, spec)
        lanes = [folds([bank], fit) for fit in fits]
        whole = [
            Lane(settings=fit, bank=bank, images=tuple(range(bank.shots)), seed=fit.seed)
            for fit in fits
        ]
        trainer = PromptTrainer(self._backbone, [*chain.from_iterable(lanes), *whole])
        trainer.advance(chosen.steps)
        judges: dict[BackboneSpec, Judge] = {}
        remembered = {}
        for seen, encoder in self._seen.items():
            ((judge_spec, _),) = chosen.judge_specs([support], fingerprint=encoder.fingerprint)
            judges[seen] = encode_judge(encoder, images, judge_spec)
            pixels = encoder.preprocess(images)
            features = encoder.encode_in_batches(pixels)
            memory, held_out = remember(features, pixels, fits[0], encoder)
            test = self._test[seen]
            distances = [
                memory.distances(test[list(range(start, min(start + _BATCH, len(test))))])
                for start in range(0, len(test), _BATCH)
            ]
            layers = {layer: torch.cat([one[layer] for one in distances]) for layer in distances[0]}
            remembered[seen] = (layers, held_out.scales)
        rows = []
        for point, fit, own, everything in zip(points, fits, lanes, whole, strict=True):
            seen, counted = chosen.judged_by(point)
            value = judge_folds(
                self._backbone, own, trainer.text_features(own), [judges[seen]], counted
            )
            layers, scales = remembered[seen]
            kept = [layer for layer in layers if counted is None or layer in counted]
            text_PE = trainer.text_features([everything])[0]
            odds = anomalous_log_odds(bank.support.tokens_BNE, text_PE, self._backbone.constants)
            of_images = anomalous_log_odds(
                self._test[seen].tokens_BNE, text_PE, self._backbone.constants
            )
            ruled = Scales(
                prompts=Scale.of_odds(odds), layers={layer: scales[layer] for layer in kept}
            )
            rule = ScoreRule.of(self._backbone, fit)
            scores = torch.cat(
                [
                    rule.score_evidence(
                        of_images[start : start + _BATCH],
                        {layer: layers[layer][start : start + _BATCH] for layer in kept},
                        ruled,
                    )[1]
                    for start in range(0, len(of_images), _BATCH)
                ]
            )
            auroc = image_auroc(scores.numpy(), self._is_anomalous)
            rows.append({"value": value.value, "images": value.images, "auroc": auroc})
        return rows


def report(names: Sequence[str], seeds: Sequence[int], done: Mapping[str, Any]) -> str:
    """The tables, in Markdown: figures in percent, intervals over settings drawn anew."""
    points = done["settings"]
    value_CP, auroc_CP, images = [], [], []
    for name in names:
        rows = [done[f"{name}/{seed}"] for seed in seeds]
        images.append(
            [[value for one in rows for value in one[p]["images"]] for p in range(len(points))]
        )
        value_CP.append([np.mean(per_image) for per_image in images[-1]])
        auroc_CP.append([np.mean([one[p]["auroc"] for one in rows]) for p in range(len(points))])
    values, aurocs = np.array(value_CP), 100 * np.array(auroc_CP)
    winners = [_winner(name, points, images[c]) for c, name in enumerate(names)]
    priors = [_winner(name, points, _with_others(images, c)) for c, name in enumerate(names)]
    header = (
        "category", "rank correlation", "defaults", "at random", "winner", "gain",
        "possible gain", "with the others' values", "gain",
    )  # fmt: skip
    table = []
    for c, name in enumerate((*names, "mean")):
        which = list(range(len(names))) if name == "mean" else [c]
        correlation = [_spearman(values[k], aurocs[k]) for k in which]
        low, high = _interval(values[which], aurocs[which])
        defaults, best = aurocs[which, 0].mean(), aurocs[which].max(1).mean()
        won = np.mean([aurocs[k, winners[k]] for k in which])
        prior = np.mean([aurocs[k, priors[k]] for k in which])
        table.append(
            (
                name,
                f"{np.mean(correlation):.2f} ({low:.2f} to {high:.2f})",
                f"{defaults:.1f}",
                f"{aurocs[which].mean():.1f}",
                f"{won:.1f}",
                f"{won - defaults:+.1f}",
                f"{best - defaults:+.1f}",
                f"{prior:.1f}",
                f"{prior - defaults:+.1f}",
            )
        )
    found = [
        f"- {name}: {json.dumps(points[winner])}"
        for name, winner in zip(names, winners, strict=True)
    ]
    return "\n".join([markdown(header, table), "", "Winners:", *found])


def _winner(
    name: str, points: Sequence[Mapping[str, Any]], images: Sequence[Sequence[float]]
) -> int:
    """The setting that a search would choose by these values of judged images."""
    return choose_winner(
        [
            TrialRecord(
                category=name,
                number=number,
                settings=dict(point),
                steps=(1,),
                validation=(float(np.mean(one)),),
                validation_sd=(float(np.std(one, ddof=1)),),
                images=tuple(one),
            )
            for number, (point, one) in enumerate(zip(points, images, strict=True))
        ]
    ).number


def _with_others(images: Sequence[Sequence[Sequence[float]]], own: int) -> list[list[float]]:
    """A category's values, and those of the others as so many more judged images.

    All are differences to the defaults: what a category's own images are worth says nothing of
    settings.
    """
    differences = [np.array(one) - np.array(one)[:1] for one in images]
    return [
        [
            float(d)
            for c, one in enumerate(differences)
            for d in (one[p] if c == own else [one[p].mean()])
        ]
        for p in range(len(images[own]))
    ]


def _spearman(x: Floats, y: Floats) -> float:
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def _interval(values: Floats, aurocs: Floats) -> tuple[float, float]:
    """95 % bootstrap interval of the mean rank correlation, over settings."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(_RESAMPLES):
        chosen = rng.integers(0, values.shape[1], values.shape[1])
        found.append(
            np.mean([_spearman(x[chosen], y[chosen]) for x, y in zip(values, aurocs, strict=True)])
        )
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled categories")
    parser.add_argument("--trials", type=int, default=64, help="settings (64)")
    parser.add_argument("--shots", type=int, default=4, help="support images (4)")
    parser.add_argument("--seeds", type=integers, default=(0, 1, 2), help="support sets (0,1,2)")
    parser.add_argument("--steps", type=int, default=100, help="optimisation steps (100)")
    parser.add_argument("--out", type=Path, default=Path("search_worth.json"))
    return parser


if __name__ == "__main__":
    main()
