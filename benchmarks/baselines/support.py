"""What a method is given and what it returns, so that all are fitted, timed and scored alike.

B images, N patch tokens, F places of the finest grid, W windows, E joint width, S support images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from apt_ray.anomalies.bank import SupportBank, encode_support
from apt_ray.anomalies.spec import BankSpec
from apt_ray.config import FitSettings
from apt_ray.detection.calibration import Threshold
from apt_ray.detection.reference import ReferenceMemory
from apt_ray.detection.rule import Scale, Scales, ScoreRule
from apt_ray.features.clip import FrozenCLIP
from apt_ray.features.protocol import ImageFeatures
from apt_ray.files import Location
from apt_ray.images import read_image
from apt_ray.prompts.remember import remember
from benchmarks.baselines.views import SCALES, encode_windows, turned


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Some images, encoded once for all methods.

    Attributes:
        features: what the backbone says of them.
        windows: scale -> `(B, W, E)`, L2-normalised; empty unless a method asks for it.
    """

    features: ImageFeatures
    windows: Mapping[int, Tensor] = field(default_factory=dict)


PatchRule = Callable[[Encoded], Tensor]
"""Encoded images -> how anomalous each place of a square grid is, `(B, N)` or `(B, F)`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRule:
    """A fitted method, asked for some images.

    Attributes:
        score: gives maps `(B, size, size)` and anomaly scores `(B,)`, both in 0..1.
        threshold: where its scores begin to be rejected; None for a method that sets none.
    """

    score: Callable[[Encoded], tuple[Tensor, Tensor]]
    threshold: Threshold | None = None


class Support:
    """One support set. What several methods need of it is encoded once.

    Attributes:
        backbone, category, paths, seed, images: what they say.
        settings: of the methods that train prompts.
    """

    def __init__(
        self, backbone: FrozenCLIP, category: str, paths: Sequence[Location], *, seed: int
    ) -> None:
        self.backbone, self.category, self.paths, self.seed = backbone, category, paths, seed
        self.settings = FitSettings(seed=seed)
        self.images: list[Image.Image] = [read_image(path) for path in paths]
        self._made: dict[str, tuple[Any, float]] = {}
        self._used: set[str] = set()

    @property
    def features(self) -> ImageFeatures:
        """Features of the S support images."""
        return self._shared("features", lambda: self._encode(self.images))

    @property
    def turned(self) -> ImageFeatures:
        """Features of each support image in 8 rotations, `8 S` images."""
        return self._shared("turned", lambda: self._encode(turned(self.images)))

    @property
    def windows(self) -> dict[int, Tensor]:
        """scale -> `(S, W, E)` features of windows."""
        pixels = self.backbone.preprocess(self.images)
        return self._shared(
            "windows",
            lambda: {scale: encode_windows(self.backbone, pixels, scale) for scale in SCALES},
        )

    @property
    def remembered(self) -> tuple[ReferenceMemory, dict[int, Scale]]:
        """The memory that `apt_ray.fit` would make of the default settings, and what its distances
        are measured in."""
        support = self.features  # timed on its own

        def make() -> tuple[ReferenceMemory, dict[int, Scale]]:
            pixels_S3HW = self.backbone.preprocess(self.images)
            memory, held_out = remember(support, pixels_S3HW, self.settings, self.backbone)
            return memory, held_out.scales

        return self._shared("remembered", make)

    @property
    def rule(self) -> ScoreRule:
        """The score rule of the default settings."""
        return ScoreRule.of(self.backbone, self.settings)

    @property
    def bank(self) -> SupportBank:
        """The anomaly bank that `apt_ray.fit` would make of the default settings."""
        return self._shared(
            "bank",
            lambda: encode_support(
                self.backbone,
                self.images,
                BankSpec.of(self.settings, self.paths, fingerprint=self.backbone.fingerprint),
            ),
        )

    def by_patches(self, rule: PatchRule) -> ImageRule:
        """The rule for maps and image scores that all methods share, of values in 0..1."""
        return ImageRule(score=lambda encoded: self.rule.score_patches(rule(encoded)))

    def alone(self, odds: PatchRule) -> ImageRule:
        """By the probabilities of patches, given as log-odds."""
        return self.by_patches(lambda encoded: odds(encoded).sigmoid())

    def with_memory(self, name: str, odds: PatchRule) -> dict[str, ImageRule]:
        """Log-odds of patches `(B, N)` beside APT's own memory, by APT's own rule; and alone."""
        memory, layers = self.remembered
        prompts = Scale.of_odds(odds(Encoded(features=self.features)))
        scales = Scales(prompts=prompts, layers=layers)

        def score(encoded: Encoded) -> tuple[Tensor, Tensor]:
            distances = memory.distances(encoded.features)
            return self.rule.score_evidence(odds(encoded), distances, scales)

        return {name: ImageRule(score=score), f"{name}-alone": self.alone(odds)}

    def fit(self, method: Method) -> tuple[dict[str, ImageRule], float]:
        """The fitted rows of a method, and the seconds that it takes when it is run alone."""
        made_before = set(self._made)
        self._used = set()
        begun = time.perf_counter()
        rules = method.fit(self)
        seconds = time.perf_counter() - begun
        return rules, seconds + sum(self._made[name][1] for name in self._used & made_before)

    def _encode(self, images: Sequence[Image.Image]) -> ImageFeatures:
        return self.backbone.encode_in_batches(self.backbone.preprocess(images))

    def _shared(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            begun = time.perf_counter()
            value = make()
            self._made[name] = (value, time.perf_counter() - begun)
        self._used.add(name)
        return self._made[name][0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A way to find anomalies from a support set.

    Attributes:
        rows: the names that it is reported under; `-alone` is without the support memory.
        about: what it is, in a line.
        fit: gives a rule for each of the rows.
        uses_windows: whether its rules look at windows.
    """

    rows: tuple[str, ...]
    about: str
    fit: Callable[[Support], dict[str, ImageRule]]
    uses_windows: bool = False
