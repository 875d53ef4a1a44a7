"""How often an anomaly is told by its family: `python -m benchmarks.resemblance --data DIR`.

Anomalies of every family are drawn on normal images that are not among the support images, and
named by those that are drawn on the support images, in front of the nearest place of these, as
`POST /v1/<category>/explain` does. Chance is one in as many families as there are. Then the defects
of the test images: which family each kind of defect is said to resemble, at its most unusual place.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from apt_ray.anomalies.families import SELECTION
from apt_ray.config import FitSettings
from apt_ray.data.folders import Category, find_categories
from apt_ray.detection.detector import Detector
from apt_ray.detection.nearest import nearest_places
from apt_ray.features.clip import load_backbone
from apt_ray.features.pixels import to_image, to_pixels
from apt_ray.features.protocol import Backbone
from apt_ray.images import decode_image, read_image
from apt_ray.prompts.fit import fit
from apt_ray.validation.resemblance import departure, draw_kinds, join
from benchmarks.rows import Row, compared, write_rows

_OTHERS = 4
_DEFECTS = 8


def main() -> None:
    """Print the share of anomalies that are told, and what defects resemble."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--categories", nargs="*", default=None)
    parser.add_argument("--draws", type=int, default=1, help="of each family on a support image")
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    backbone = load_backbone()
    rows: list[Row] = []
    for category in find_categories(options.data, options.categories):
        told = _Told(backbone, category, options.shots, options.draws)
        first, third, pairs = told.drawn()
        print(f"{category.name}: told {first:.0%}, among the first three {third:.0%}", flush=True)
        for (family, said), count in pairs.most_common(6):
            print(f"    {family} taken for {said}: {count}")
        for kind, found in told.defects().items():
            print(f"  {kind}: {', '.join(f'{n} {name}' for name, n in found.most_common(4))}")
        name = f"{category.name}: anomalies told by their family, against chance"
        rows.append(compared(name, first, 1 / len(SELECTION), "share", more_is_better=True))
    write_rows(rows, options.json)


class _Told:
    """A category whose images are looked at."""

    def __init__(self, backbone: Backbone, category: Category, shots: int, draws: int) -> None:
        self._backbone, self._category = backbone, category
        good = category.support_set(shots + _OTHERS, seed=0)
        with torch.enable_grad():
            self._set = fit(category.name, good[:shots], FitSettings(steps=1), backbone=backbone)
        self._detector = Detector(backbone, self._set)
        self._others = [read_image(path) for path in good[shots:]]
        copies = [decode_image(data) for data in self._set.thumbnails]
        features = backbone.encode_in_batches(backbone.preprocess(copies))
        self._layers = {layer: x.half().cpu() for layer, x in features.layers.items()}
        self._kinds = join(list(draw_kinds(backbone, copies, self._layers, draws=draws, seed=0)))

    def drawn(self) -> tuple[float, float, Counter[tuple[str, str]]]:
        """Shares of drawn anomalies whose family is named first, or third at last; errors."""
        g = torch.Generator().manual_seed(1)
        ranks: list[int] = []
        wrong: Counter[tuple[str, str]] = Counter()
        for one_3HW in to_pixels(self._others, 512):
            for family, perturb in SELECTION.items():
                drawn = perturb(one_3HW[None], g)
                names = self._names(to_image(drawn.pixels_B3HW[0]), drawn.mask_BHW[0])
                if names is None:
                    continue
                ranks.append(names.index(family))
                if names[0] != family:
                    wrong[family, names[0]] += 1
        return (
            sum(rank == 0 for rank in ranks) / len(ranks),
            sum(rank < 3 for rank in ranks) / len(ranks),
            wrong,
        )

    def defects(self) -> dict[str, Counter[str]]:
        """Kind of defect -> the families that its images are said to resemble."""
        found: dict[str, Counter[str]] = {}
        for image in self._category.test:
            if image.is_anomalous:
                counter = found.setdefault(str(image.defect_type), Counter())
                if counter.total() < _DEFECTS:
                    names = self._names(read_image(image.path), None)
                    if names is not None:
                        counter[names[0]] += 1
        return found

    def _names(self, image: Image.Image, mask_HW: torch.Tensor | None) -> Sequence[str] | None:
        """Families by resemblance at the most unusual place, of a mask if there is one."""
        features = self._backbone.encode_images(self._backbone.preprocess([image]))
        maps_1SS, _ = self._detector.score(features)
        map_SS = maps_1SS[0].cpu()
        side = len(map_SS)
        if mask_HW is not None:
            inside = torch.nn.functional.adaptive_max_pool2d(mask_HW[None].float(), side)[0] > 0
            if not inside.any():
                return None
            map_SS = torch.where(inside, map_SS, -1.0)
        row, column = divmod(int(map_SS.argmax()), side)
        point = ((column + 0.5) / side, (row + 0.5) / side)
        scales = self._set.provenance.scales
        (place,) = nearest_places(features, self._layers, scales, [point])
        direction_D = departure(features, point, self._layers, place)
        return [each.family for each in self._kinds.of(direction_D)]


if __name__ == "__main__":
    main()
