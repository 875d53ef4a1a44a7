"""What feedback is worth, and what wrong one costs: `python -m benchmarks.feedback --data DIR`.

Each category is fitted to four images for each seed. The test images are halved at random: of the
one half the good ones that score highest are accepted into the memory, 1, 2, 4 or 8 of them; the
other half is measured. `wrong` accepts defective images instead, as many as said: what a mistaken
or malicious person could do. The images that are accepted are never measured. `refused` is how
often four confirmed defects of the first half, which were rejected, would have stopped it.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from apt_ray.auroc import auroc
from apt_ray.data.folders import Category, find_categories
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.features.clip import load_backbone
from apt_ray.features.protocol import Backbone, ImageFeatures
from apt_ray.images import read_image
from apt_ray.prompts.accept import grown
from apt_ray.prompts.fit import fit
from apt_ray.tables import markdown
from benchmarks.rows import Row, compared, write_rows

_ACCEPTED = (1, 2, 4, 8)
_STORED = 4


def main() -> None:
    """Print AUROC, false alarms and misses before and after, mean over seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    backbone = load_backbone()
    table: list[list[str]] = []
    rows: list[Row] = []
    for category in find_categories(options.data):
        with torch.inference_mode():
            images = [read_image(image.path) for image in category.test]
            features = backbone.encode_in_batches(backbone.preprocess(images))

        def after(
            what: str, count: int, category: Category = category, seen: ImageFeatures = features
        ) -> list[float]:
            found = [_after(category, backbone, seen, what, count, seed) for seed in options.seeds]
            return [100 * float(value) for value in np.array(found).mean(0)]

        fitted = after("right", 0)
        table.append([category.name, "as fitted", *(f"{value:.1f}" for value in fitted)])
        for what in ("right", "wrong"):
            for count in _ACCEPTED:
                found = after(what, count)
                table.append(
                    [category.name, f"{count} {what}", *(f"{value:.1f}" for value in found)]
                )
                print(*table[-1], flush=True)
                title = f"{category.name}, {count} {what}: "
                rows += [
                    compared(f"{title}image AUROC", found[0], fitted[0], "%", more_is_better=True),
                    compared(f"{title}misses", found[2], fitted[2], "%"),
                ]
    header = ("category", "accepted", "image AUROC", "false alarms", "misses", "refused")
    print(markdown(header, table))
    write_rows(rows, options.json)


_FITTED: dict[tuple[str, int], PromptSet] = {}


def _after(
    category: Category,
    backbone: Backbone,
    features: ImageFeatures,
    what: str,
    count: int,
    seed: int,
) -> tuple[float, float, float, float]:
    """(image AUROC, share of good parts rejected, share of defects passed) on the other half, and
    1.0 if one of the stored defects, which were rejected, is not any more."""
    key = (category.name, seed)
    if key not in _FITTED:
        _FITTED[key] = fit(category.name, category.support_set(4, seed=seed), backbone=backbone)
    prompt_set = _FITTED[key]
    limit = prompt_set.threshold.value
    is_bad = np.array([image.is_anomalous for image in category.test])
    order = list(range(len(is_bad)))
    random.Random(seed).shuffle(order)
    given, measured = order[: len(order) // 2], order[len(order) // 2 :]
    with torch.inference_mode():
        scores = _scores(backbone, prompt_set, features, given)
        of_kind = [place for place in given if is_bad[place] == (what == "wrong")]
        of_kind.sort(key=lambda place: -scores[place])
        memory = prompt_set.memory
        for place in of_kind[:count]:
            memory = grown(
                memory,
                features[place : place + 1],
                prompt_set.provenance.scales,
                size=prompt_set.settings.reference_size,
            )
        changed = replace(prompt_set, memory=memory)
        after = _scores(backbone, changed, features, measured)
        stored = [place for place in given if is_bad[place] and place not in of_kind[:count]]
        stored = [place for place in stored if scores[place] > limit][:_STORED]
        still = _scores(backbone, changed, features, stored)
    values = np.array([after[place] for place in measured])
    bad = is_bad[measured]
    rejected = values > limit
    return (
        auroc(np.sort(values[~bad]), values[bad]),
        float(rejected[~bad].mean()),
        float((~rejected[bad]).mean()),
        float(any(score <= limit for score in still.values())),
    )


def _scores(
    backbone: Backbone, prompt_set: PromptSet, features: ImageFeatures, places: Sequence[int]
) -> dict[int, float]:
    detector = Detector(backbone, prompt_set)
    return {place: float(detector.score(features[place : place + 1])[1]) for place in places}


if __name__ == "__main__":
    main()
