"""What confirmed defects teach: `python -m benchmarks.confirmed --data DIR`.

Each category with several kinds of defects is fitted to four images for each seed. Of every kind 1,
2, 4 or 8 test images are confirmed, with their masks where there are any; all others are named,
whether they are rejected or not. `text alone` names by words: by the kind whose name is nearest, in
the joint space of images and texts, to the most anomalous patches. Accuracy is the mean over kinds,
seeds and three draws.
"""

import argparse
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F

from apt_ray.data.folders import Category, Defect, LabelledImage, find_categories
from apt_ray.detection.detector import Detector
from apt_ray.detection.kinds import Kinds
from apt_ray.features.clip import load_backbone
from apt_ray.features.protocol import Backbone, ImageFeatures
from apt_ray.images import read_image
from apt_ray.prompts.confirm import look_at
from apt_ray.prompts.fit import fit
from apt_ray.tables import markdown
from apt_ray.validation.evaluation import percent
from apt_ray.validation.naming import Named, format_confusion
from benchmarks.rows import Row, compared, write_rows

_COUNTS = (1, 2, 4, 8)
_DRAWS = 3
_SENTENCES = ("{}", "a {}", "a {} on a surface", "a part with a {}", "a photo of a {}")


def main() -> None:
    """Print the accuracy of naming by the number of confirmed defects, and a table of confusion."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--categories", nargs="*", default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    backbone = load_backbone()
    table: list[tuple[str, ...]] = []
    rows: list[Row] = []
    for category in find_categories(options.data, options.categories or ()):
        kinds = {image.defect_type for image in category.test if image.is_anomalous}
        if len(kinds) == 1:
            continue
        found: dict[str, list[Named]] = defaultdict(list)
        shown = [_Shown.of(image, backbone) for image in category.test if image.is_anomalous]
        for seed in options.seeds:
            for what, named in _of_seed(category, backbone, shown, seed).items():
                found[what] += named
        means = {what: [one.balanced_accuracy for one in named] for what, named in found.items()}
        cells = [percent(values) for values in means.values()]
        table.append((category.name, f"{100 / len(kinds):.1f}", *cells))
        print(format_confusion(found[str(_COUNTS[-1])]), "\n", flush=True)
        rows += [
            compared(
                f"{category.name}, {what}: kinds named right, against chance",
                fmean(values),
                1 / len(kinds),
                "share",
                more_is_better=True,
            )
            for what, values in means.items()
        ]
    print(markdown(("category", "chance", "text alone", *map(str, _COUNTS)), table))
    write_rows(rows, options.json)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shown:
    """A defect whose image is encoded."""

    defect: Defect
    size: tuple[int, int]
    features: ImageFeatures

    @classmethod
    def of(cls, image: LabelledImage, backbone: Backbone) -> "_Shown":
        shown = read_image(image.path)
        return cls(
            defect=Defect(path=image.path, kind=image.defect_type, mask=image.mask),
            size=shown.size,
            features=backbone.encode_images(backbone.preprocess([shown])),
        )

    def look(self, detector: Detector, *, confirmed: bool) -> torch.Tensor:
        """What it looks like, where somebody said where it is and where nobody did."""
        defect = self.defect if confirmed else replace(self.defect, mask=None)
        return look_at(detector, self.features, defect, self.size)[1]


def _of_seed(
    category: Category, backbone: Backbone, shown: Sequence[_Shown], seed: int
) -> Mapping[str, list[Named]]:
    """What the defects are called, by what was confirmed."""
    with torch.enable_grad():
        support = category.support_set(4, seed=seed)
        detector = Detector(backbone, fit(category.name, support, backbone=backbone))
    learned = [each.look(detector, confirmed=True) for each in shown]
    looks_XD = torch.stack([each.look(detector, confirmed=False) for each in shown])
    kinds_X = [each.defect.kind for each in shown]
    places: dict[str, list[int]] = defaultdict(list)
    for place, kind in enumerate(kinds_X):
        places[kind].append(place)

    def named(examples: int, said: Mapping[int, str]) -> Named:
        pairs = tuple((kinds_X[place], name) for place, name in said.items())
        return Named(category=category.name, seed=seed, examples=examples, pairs=pairs)

    found: dict[str, list[Named]] = {"text alone": [named(0, _by_text(detector, shown))]}
    for count in _COUNTS:
        found[str(count)] = []
        for draw in range(_DRAWS):
            g = random.Random(f"{seed} {draw}")
            drawn = [place for own in places.values() for place in g.sample(own, count)]
            kinds = Kinds.of([(kinds_X[place], learned[place]) for place in drawn])
            rest = [place for place in range(len(shown)) if place not in drawn]
            probable = kinds.probabilities(looks_XD[rest])
            said = [max(each, key=each.__getitem__) for each in probable]
            found[str(count)].append(named(count, dict(zip(rest, said, strict=True))))
    return found


def _by_text(detector: Detector, shown: Sequence[_Shown]) -> dict[int, str]:
    """The kind whose words are nearest to the most anomalous patches, by the defect's place."""
    backbone = detector.backbone
    kinds = sorted({each.defect.kind for each in shown})
    said = [kind.replace("_", " ") for kind in kinds]
    texts = [sentence.format(kind) for kind in said for sentence in _SENTENCES]
    each_KSE = backbone.encode_texts(texts).unflatten(0, (len(kinds), -1))
    texts_KE = F.normalize(each_KSE.mean(1), dim=-1)
    named: dict[int, str] = {}
    for place, each in enumerate(shown):
        maps_1SS, _ = detector.score(each.features)
        there_1SS = (maps_1SS >= maps_1SS.max() / 2).float()
        weights_1N = F.adaptive_avg_pool2d(there_1SS, backbone.grid).flatten(1)
        token_E = (weights_1N @ each.features.tokens_BNE[0])[0]
        named[place] = kinds[int((texts_KE @ token_E).argmax())]
    return named


if __name__ == "__main__":
    main()
