"""Drift: false alarms of stable months, and how soon a change is told.

`python -m benchmarks.drift [--months 1000] [--images 30000] [--runs 20]`

Sample images are inspected once, as they are and as another camera, lamp or supplier would show
them; months and scenarios are then drawn from what was found, with replacement.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from apt_ray import Detector, FitSettings, fit, load_backbone
from apt_ray.data.samples.factory import defect_types, draw_sample
from apt_ray.detection.drift import (
    CALIBRATION,
    LIVE,
    TESTS,
    Appearance,
    DriftSettings,
    DriftWatch,
    Panel,
    appearance_of,
)
from apt_ray.features.protocol import Backbone, ImageFeatures

Floats = NDArray[np.float64]
Change = Callable[[Image.Image, np.random.Generator], Image.Image]

_CATEGORIES = ("washer", "textile")
_SHOTS, _CALIBRATION_IMAGES = 4, 16
_GOOD, _OTHERS, _LEVELS = 150, 40, 11
_DEFECTIVE = 0.03
_STABLE = 1500  # images before a change, those of the reference among them
_AGEING, _DIMMED = 2000, 0.3
_JITTER = 1e-9


@dataclass(frozen=True, slots=True)
class Seen:
    """What an inspection of one image gives."""

    score: float
    appearance: Appearance
    features_W: NDArray[np.float32]


Pool = list[Seen]


@dataclass(frozen=True, slots=True)
class Pools:
    """Inspected images of one category.

    Attributes:
        dimmed: the images of a lamp that has lost 0 to `_DIMMED` of its light, in even steps.
    """

    calibration: tuple[float, ...]
    good: Pool
    defective: Pool
    bumped: Pool
    supplier: Pool
    dimmed: list[Pool]


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--months", type=int, default=1000)
    parser.add_argument("--images", type=int, default=30_000, help="of a month")
    parser.add_argument("--runs", type=int, default=20, help="of each scenario")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    backbone = load_backbone()
    pools = {category: _inspected(category, backbone) for category in _CATEGORIES}
    _cost(backbone)
    _scenarios(pools, arguments.runs)
    _stable_months(pools, arguments.months, arguments.images)
    _dependent_months(pools, arguments.months, arguments.images)


def _inspected(category: str, backbone: Backbone) -> Pools:
    rng = np.random.default_rng(0)
    seeds = iter(range(10_000))
    with TemporaryDirectory() as folder:
        files = []
        for number in range(_SHOTS + _CALIBRATION_IMAGES):
            files.append(Path(folder) / f"{number}.png")
            draw_sample(category, seed=next(seeds))[0].save(files[-1])
        prompt_set = fit(
            category,
            files[:_SHOTS],
            FitSettings(),
            backbone=backbone,
            calibration=files[_SHOTS:],
        )
    detector = Detector(backbone, prompt_set)

    def see(count: int, change: Change | None = None, defects: Sequence[str] = ("good",)) -> Pool:
        pool = []
        for number in range(count):
            image = draw_sample(category, defects[number % len(defects)], seed=next(seeds))[0]
            pool.append(_see(change(image, rng) if change else image, detector))
        return pool

    steps = [_DIMMED * step / (_LEVELS - 1) for step in range(_LEVELS)]
    return Pools(
        calibration=prompt_set.threshold.scores,
        good=see(_GOOD),
        defective=see(_OTHERS, defects=defect_types(category)),
        bumped=see(_OTHERS, _bumped),
        supplier=see(_OTHERS, _of_another_supplier),
        dimmed=[see(_GOOD // _LEVELS, _dimmed(lost)) for lost in steps],
    )


@torch.inference_mode()
def _see(image: Image.Image, detector: Detector) -> Seen:
    pixels_1CHW = detector.backbone.preprocess([image])
    features = detector.backbone.encode_images(pixels_1CHW)
    _, scores_1 = detector.score(features)
    return Seen(
        float(scores_1[0]), appearance_of(pixels_1CHW[0].numpy()), features.whole_BW[0].numpy()
    )


def _bumped(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turned by 3 degrees, moved by 3 % of the width, and slightly out of focus."""
    by = (image.width * 0.03, image.height * 0.02)
    turned = image.rotate(3, Image.Resampling.BICUBIC, translate=(int(by[0]), int(by[1])))
    return turned.filter(ImageFilter.GaussianBlur(image.width / 240))


def _of_another_supplier(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Warmer by 3 %, with fine lines of 2 % across the surface."""
    pixels_HWC = np.asarray(image, np.float32) / 255
    phase = rng.uniform(0, 6)
    lines_H = 1 + 0.02 * np.sin(2.1 * np.arange(image.height) + phase)
    return _image(pixels_HWC * np.array([1.03, 1.0, 0.95]) * lines_H[:, None, None])


def _dimmed(lost: float) -> Change:
    return lambda image, rng: _image(np.asarray(image, np.float32) / 255 * (1 - lost))


def _image(pixels_HWC: NDArray[Any]) -> Image.Image:
    return Image.fromarray(np.rint(np.clip(pixels_HWC, 0, 1) * 255).astype(np.uint8))


def _values(pool: Pool, like: Pool) -> Floats:
    """The live streams' values of a pool's images, (images, S); distances are from `like`."""
    vectors = [
        (np.asarray(seen.appearance.colour), seen.features_W / np.linalg.norm(seen.features_W))
        for seen in like
    ]
    colour = np.mean([vector[0] for vector in vectors], axis=0)
    middle = np.mean([vector[1] for vector in vectors], axis=0)
    middle /= np.linalg.norm(middle)
    return np.array(
        [
            (
                seen.score,
                seen.appearance.brightness,
                seen.appearance.sharpness,
                np.linalg.norm(np.asarray(seen.appearance.colour) - colour),
                1 - middle @ seen.features_W / np.linalg.norm(seen.features_W),
            )
            for seen in pool
        ]
    )


class _Months:
    """Months of several lines side by side, image by image: values (R, S)."""

    def __init__(
        self, pools: Pools, runs: int, *, defective: float, seed: int, scale: float = 1.0
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self._good = scale * _values(pools.good, pools.good)
        self._bad = scale * _values(pools.defective, pools.good)
        self._defective, self._runs = defective, runs
        self.spread_S = self._good.std(0)

    def image(self) -> Floats:
        values = self._good[self.rng.integers(len(self._good), size=self._runs)]
        if self._defective:
            bad = self.rng.random(self._runs) < self._defective
            values[bad] = self._bad[self.rng.integers(len(self._bad), size=int(bad.sum()))]
        noise: Floats = values + self.rng.uniform(-_JITTER, _JITTER, values.shape)
        return noise


def _alarmed(
    month: _Months,
    images: int,
    settings: DriftSettings,
    *,
    calibration: int,
    later: Callable[[int], Floats | float] = lambda number: 0.0,
) -> NDArray[np.bool_]:
    """Which of the months raise an alarm; `later` is what is added to image after image."""
    compared = Panel(
        (CALIBRATION,),
        np.stack([_good_scores(month) for _ in range(calibration)]),
        settings,
    )
    learned = settings.reference - settings.reference // 4
    first = np.stack([month.image() + later(number) for number in range(learned)])
    live = Panel(LIVE, first, settings)
    alarmed = np.zeros(first.shape[1], np.bool_)
    for values in first:
        alarmed |= compared.add(values[:, :1]).any(1)
    for number in range(learned, learned + images):
        values = month.image() + later(number)
        alarmed |= live.add(values).any(1) | compared.add(values[:, :1]).any(1)
    return alarmed


def _good_scores(month: _Months) -> Floats:
    scores: Floats = month._good[month.rng.integers(len(month._good), size=month._runs)][:, :1]
    return scores + month.rng.uniform(-_JITTER, _JITTER, scores.shape)


def _stable_months(pools: dict[str, Pools], months: int, images: int) -> None:
    """Exchangeable images: what is promised, and what came of it."""
    print("\n| stable months | promised at most | with an alarm |\n|---|---|---|")
    for name, settings, defective, scale in (
        (f"as shipped, {_DEFECTIVE:.0%} defective", DriftSettings(), _DEFECTIVE, 1.0),
        # At this scale no difference is too small to matter.
        ("bare test, 1e-5 an image", DriftSettings(false_alarms=1e-5, tolerance=0), 0.0, 1e6),
    ):
        found = []
        for seed, each in enumerate(pools.values()):
            month = _Months(each, months // len(pools), defective=defective, seed=seed, scale=scale)
            found.append(_alarmed(month, images, settings, calibration=_CALIBRATION_IMAGES))
        share, bound = np.concatenate(found).mean(), min(1, settings.false_alarms * images)
        print(f"| {name} | {bound:.2%} | {share:.2%} of {months} |", flush=True)


def _dependent_months(pools: dict[str, Pools], months: int, images: int) -> None:
    """Images that follow one another alike: nothing is promised."""
    runs = months // 10
    print("\n| dependent months | reference | with an alarm |\n|---|---|---|")
    each = next(iter(pools.values()))

    def shift(spread_S: Floats, columns: Sequence[int], amount: Floats | float) -> Floats:
        added = np.zeros((runs, len(LIVE)))
        added[:, columns] = np.asarray(amount)[..., None] * spread_S[list(columns)]
        return added

    def wandering(month: _Months, kept: float) -> Callable[[int], Floats]:
        state = month.rng.normal(size=runs)

        def later(number: int) -> Floats:
            nonlocal state
            state = kept * state + np.sqrt(1 - kept**2) * month.rng.normal(size=runs)
            return shift(month.spread_S, [1], state)

        return later

    def days(month: _Months) -> Callable[[int], Floats]:
        begun = month.rng.uniform(0, 2 * np.pi, runs)
        return lambda number: shift(
            month.spread_S, [1], 3 * np.sin(begun + 2 * np.pi * number / 1000)
        )

    def lots(month: _Months) -> Callable[[int], Floats]:
        state = month.rng.normal(size=runs)

        def later(number: int) -> Floats:
            nonlocal state
            if number % 500 == 0:
                state = month.rng.normal(size=runs)
            return shift(month.spread_S, [0, 1], state)

        return later

    cases: list[tuple[str, Callable[[_Months], Callable[[int], Floats]], tuple[int, ...]]] = [
        ("light wanders, autocorrelation 0.9", lambda m: wandering(m, 0.9), (400, 2000)),
        ("light wanders, autocorrelation 0.99", lambda m: wandering(m, 0.99), (400, 2000)),
        ("day and night of 3 deviations, 1,000 images a day", days, (400, 2000)),
        ("lots of 500 parts, each a deviation off", lots, (400, 2000, 10_000)),
    ]
    for name, case, references in cases:
        for reference in references:
            month = _Months(each, runs, defective=_DEFECTIVE, seed=7)
            settings = DriftSettings(reference=reference)
            alarmed = _alarmed(
                month, images, settings, calibration=_CALIBRATION_IMAGES, later=case(month)
            )
            print(f"| {name} | {reference} | {alarmed.mean():.1%} of {runs} |", flush=True)


def _scenarios(pools: dict[str, Pools], runs: int) -> None:
    """What `DriftWatch` says, and after how many images."""
    print("\n| scenario | category | told after, median | worst | first stream |")
    print("|---|---|---|---|---|")
    for category, each in pools.items():
        for name in ("camera bumped", "lamp aged", "new supplier", "3 to 20 % defective"):
            told = [_told(each, name, seed) for seed in range(runs)]
            after = [images for images, _ in told]
            streams = Counter(stream for _, stream in told)
            first = ", ".join(f"{stream} {count}" for stream, count in streams.most_common())
            median = statistics.median(after)
            print(f"| {name} | {category} | {median:g} | {max(after)} | {first} |", flush=True)


def _told(pools: Pools, name: str, seed: int) -> tuple[int, str]:
    """Images after the change until the first alarm, and its stream; negative if it came before."""
    rng = np.random.default_rng(seed)
    watch = DriftWatch(DriftSettings(), calibration=pools.calibration, seed=seed)
    for number in range(_STABLE + 2 * _AGEING):
        since = number - _STABLE
        pool = pools.defective if rng.random() < _DEFECTIVE else pools.good
        if since >= 0:
            if name == "camera bumped":
                pool = pools.bumped
            elif name == "new supplier":
                pool = pools.supplier
            elif name == "lamp aged":
                level = min(since / _AGEING, 1) * (_LEVELS - 1)
                pool = pools.dimmed[int(level + rng.random()) if level < _LEVELS - 1 else -1]
            else:
                pool = pools.defective if rng.random() < 0.2 else pools.good
        seen = pool[rng.integers(len(pool))]
        alarms = watch.add(
            score=seen.score, appearance=seen.appearance, features_W=seen.features_W, at=number
        )
        if alarms:
            return since + 1, alarms[0].stream
    return 10**6, "none"


def _cost(backbone: Backbone) -> None:
    """What an inspected image costs more."""
    size = backbone.input_size
    pixels_1CHW = backbone.preprocess([draw_sample("washer", seed=1)[0]])
    features: ImageFeatures = backbone.encode_images(pixels_1CHW)
    pixels_3HW, features_W = pixels_1CHW[0].numpy(), features.whole_BW[0].numpy()
    appearance = appearance_of(pixels_3HW)
    watch = DriftWatch(DriftSettings(), calibration=[0.1, 0.2, 0.3, 0.4])

    def watched() -> object:
        return watch.add(score=0.2, appearance=appearance, features_W=features_W, at=0)

    for _ in range(500):
        watched()

    def median_ms(part: Callable[[], object]) -> float:
        times = []
        for _ in range(300):
            started = time.process_time()
            part()
            times.append(1000 * (time.process_time() - started))
        return statistics.median(times)

    print("| of an image | CPU ms |\n|---|---|")
    for name, part in (
        (f"appearance at {size} px", lambda: appearance_of(pixels_3HW)),
        ("features of the whole", lambda: features.whole_BW),
        (f"{TESTS} tests", watched),
    ):
        print(f"| {name} | {median_ms(part):.2f} |", flush=True)


if __name__ == "__main__":
    main()
