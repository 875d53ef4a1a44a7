"""APT beside its neighbours, all on one backbone: `python -m benchmarks.accuracy --data DIR`.

DIR holds categories in the layout of MVTec AD, of VisA, or plain folders. Every method is fitted on
the same support sets, scored by the same image rule (the mean of the highest 0.5 % of the map; only
PatchCore has its own), and never sees a test image before it is reported; nothing is chosen on
them. Each test image is encoded once. With `--json FILE` finished rows are kept, and the same
command goes on after a stop.

The second table says what may be claimed: differences of means over the categories with paired 95 %
bootstrap intervals over test images and seeds.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from apt_ray.cli.flags import add_backbone_flags, given_backbone, integers
from apt_ray.config import FitSettings
from apt_ray.data.folders import Category, find_categories
from apt_ray.errors import AptError
from apt_ray.features.clip import load_backbone
from apt_ray.features.protocol import Backbone, ImageFeatures
from apt_ray.files import location
from apt_ray.images import read_image
from apt_ray.validation.evaluation import TestSet
from apt_ray.validation.intervals import resample
from benchmarks.baselines import METHODS
from benchmarks.baselines.support import Encoded, ImageRule, Method, Support
from benchmarks.baselines.views import SCALES, encode_windows
from benchmarks.ledger import Key, Ledger, Row
from benchmarks.tables import PUBLISHED, format_claims, format_rows

_BATCH = 16


class EncodedTestSet:
    """The test images of a category, encoded once for all methods.

    Attributes:
        test: the images and what is true of them.
    """

    def __init__(self, category: Category, backbone: Backbone, bar: tqdm[None]) -> None:
        self.test = TestSet.read(category)
        self._backbone, self._bar = backbone, bar
        begun = time.perf_counter()
        self._features: ImageFeatures = self.test.encode(backbone, self._show)
        self._encode_seconds = time.perf_counter() - begun
        self._windows: dict[int, torch.Tensor] = {}
        self._window_seconds = 0.0

    def rows(
        self, method: Method, rules: dict[str, ImageRule], support: Support, fit_seconds: float
    ) -> list[tuple[Row, dict[str, object]]]:
        """Each of the method's rules, measured on all test images outside the support set."""
        encode_seconds = self._encode_seconds
        if method.uses_windows:
            self._encode_windows()
            encode_seconds += self._window_seconds
        images = len(self.test.category.test)
        measured = []
        for name, rule in rules.items():
            score_seconds = 0.0

            def score(
                index: list[int], rule: ImageRule = rule
            ) -> tuple[torch.Tensor, torch.Tensor]:
                nonlocal score_seconds
                begun = time.perf_counter()
                maps_BHW, scores_B = rule.score(self._encoded(index))
                maps_BHW = maps_BHW.cpu()
                score_seconds += time.perf_counter() - begun
                return maps_BHW, scores_B

            result = self.test.result(
                score,
                variant=name,
                support=support.paths,
                seed=support.seed,
                threshold=rule.threshold,
            )
            row = Row.of(
                result,
                fit_seconds=fit_seconds,
                image_ms=1000
                * (encode_seconds / images + score_seconds / len(result.scores.names)),
            )
            measured.append((row, resample(result.scores)))
        return measured

    def _encoded(self, index: list[int]) -> Encoded:
        device = self._backbone.device
        return Encoded(
            features=self._features[index].to(device),
            windows={
                scale: windows_IWE[index].to(device).float()
                for scale, windows_IWE in self._windows.items()
            },
        )

    def _encode_windows(self) -> None:
        if self._windows:
            return
        begun = time.perf_counter()
        parts: dict[int, list[torch.Tensor]] = {scale: [] for scale in SCALES}
        images = self.test.category.test
        for start in range(0, len(images), _BATCH):
            batch = [read_image(image.path) for image in images[start : start + _BATCH]]
            pixels = self._backbone.preprocess(batch)
            for scale in SCALES:
                parts[scale].append(encode_windows(self._backbone, pixels, scale).half().cpu())
            self._show("encode windows", start + len(batch), len(images))
        self._windows = {scale: torch.cat(tensors) for scale, tensors in parts.items()}
        self._window_seconds = time.perf_counter() - begun

    def _show(self, what: str, done: int, total: int) -> None:
        self._bar.set_postfix_str(f"{self.test.category.name}: {what} {done}/{total}")


def measure(
    categories: Sequence[Category],
    backbone: Backbone,
    ledger: Ledger,
    *,
    methods: Sequence[Method] = METHODS,
    shots: Sequence[int],
    seeds: Sequence[int],
) -> None:
    """Add every row that the ledger lacks."""
    total = len(categories) * len(shots) * len(seeds) * len(methods)
    with tqdm(total=total, desc="accuracy", disable=None) as bar:
        for category in categories:
            # Too few normal images are found out before anything is encoded.
            supports = {
                (count, seed): category.support_set(count, seed)
                for count, seed in product(shots, seeds)
            }
            missing = {
                place: [
                    method
                    for method in methods
                    if any(
                        Key(row, category.name, *place) not in ledger.rows for row in method.rows
                    )
                ]
                for place in supports
            }
            bar.update(sum(len(methods) - len(left) for left in missing.values()))
            if not any(missing.values()):
                continue
            encoded = EncodedTestSet(category, backbone, bar)
            for (count, seed), left in missing.items():
                support = Support(backbone, category.name, supports[count, seed], seed=seed)
                for method in left:
                    bar.set_postfix_str(f"{category.name}: {count} shots, {method.rows[0]}")
                    rules, seconds = support.fit(method)
                    for row, values in encoded.rows(method, rules, support, seconds):
                        ledger.add(row, values)
                    bar.update()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns 0, or 1 after a clear error."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except AptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; with --json FILE the same command goes on", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    categories = find_categories(options.data, options.categories)
    backbone = load_backbone(given_backbone(options), device=options.device)
    setup = {
        "data": str(categories[0].root.parent),
        "backbone": backbone.fingerprint,
        "settings": FitSettings().model_dump(),
        "version": version("apt-ray"),
    }
    ledger = Ledger(options.json, setup)
    chosen = [
        method for method in METHODS if not options.methods or method.rows[0] in options.methods
    ]
    measure(categories, backbone, ledger, methods=chosen, shots=options.shots, seeds=options.seeds)
    print(
        f"{backbone.spec.name}, {backbone.input_size} px, {torch.get_num_threads()} threads on"
        f" {backbone.device}; percent, mean and standard deviation over seeds"
        f" {', '.join(map(str, options.seeds))}\n"
    )
    print(format_rows(ledger, published=options.published))
    print(f"\n{format_claims(ledger)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    names = [method.rows[0] for method in METHODS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__,
        epilog="methods:\n"
        + "\n".join(f"  {method.rows[0]:12} {method.about}" for method in METHODS)
        + "\n\nROW-alone is the patch probabilities without the support memory.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", type=location, required=True, help="folder of categories, or s3://"
    )
    parser.add_argument("--categories", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument(
        "--methods", nargs="+", default=[], choices=names, metavar="NAME", help="only these"
    )
    parser.add_argument("--shots", type=integers, default=(1, 4), help="support images (1,4)")
    parser.add_argument("--seeds", type=integers, default=(0, 1, 2), help="support sets (0,1,2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows here, go on here")
    parser.add_argument(
        "--published",
        choices=tuple(PUBLISHED),
        help="set the published figures of this data set beside ours",
    )
    add_backbone_flags(parser)
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="CPU threads of torch (all)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
