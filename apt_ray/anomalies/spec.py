"""What a bank is made from. No PyTorch here: the light processes of a search name banks by it."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from pydantic import Field

from apt_ray.config import NOISE_LADDER, FitSettings, Ground, NoiseRegion, Settings
from apt_ray.errors import SettingsError
from apt_ray.files import AnyPath, file_sha256

_PACKAGE = Path(__file__).resolve().parents[1]
_CODE = (
    "anomalies/*.py",
    "features/**/*.py",
    "images.py",
    "levels.py",
    "detection/reference.py",
    "prompts/remember.py",
    "validation/judge.py",
)
_LIBRARIES = ("torch", "pillow", "numpy")


class EncodedSpec(Settings):
    """All that something encoded of a support set depends on: of equal specs it is equal, down to
    the last bit.

    A change of any field, of the code that perturbs, encodes or remembers, or of the libraries
    under it makes another `digest`.
    """

    fingerprint: str = Field(description="Of the encoder.")
    support: tuple[str, ...] = Field(
        min_length=1, description="A digest of each support image, in order."
    )
    seed: int = Field(ge=0, description="Of all noise, regions, perturbations and copies.")
    ground: Ground = Field(default="white", description="What transparency is laid on.")
    white_level: int | None = Field(
        default=None, description="Of 16-bit files that do not say theirs; None: as support has it."
    )

    @property
    def digest(self) -> str:
        """40 hex digits: its name on disk, in an object store and in a call."""
        content = f"{_code_digest()} {type(self).__name__} {self.model_dump_json()}"
        return hashlib.sha256(content.encode()).hexdigest()[:40]

    def check_source(self, what: str, images: int, fingerprint: str) -> None:
        """SettingsError unless `what` is to be made from so many images by this encoder."""
        if (self.fingerprint, len(self.support)) != (fingerprint, images):
            raise SettingsError(
                f"the {what} is to be made from {len(self.support)} images by encoder"
                f" {self.fingerprint}, not from {images} by {fingerprint}: make its spec from these"
            )


class JudgeSpec(EncodedSpec):
    """What a judge of trials is made from (`validation.judge`)."""

    reference_copies: int = Field(ge=0, description="As in the settings of a fit.")
    reference_rotations: int = Field(ge=1, description="As in the settings of a fit.")
    reference_size: int = Field(ge=1, description="As in the settings of a fit.")

    @classmethod
    def of(
        cls, settings: FitSettings, support: Sequence[str], *, fingerprint: str, seed: int
    ) -> "JudgeSpec":
        """The spec of the judge of trials with these settings.

        Args:
            settings: of the trial.
            support: a digest of each support image.
            fingerprint: of the encoder.
            seed: of the judge.
        """
        return cls(
            fingerprint=fingerprint,
            support=tuple(support),
            seed=seed,
            ground=settings.ground,
            white_level=settings.white_level,
            reference_copies=settings.reference_copies,
            reference_rotations=settings.reference_rotations,
            reference_size=settings.reference_size,
        )


class BankSpec(EncodedSpec):
    """What a bank is made from (`anomalies.bank`)."""

    strengths: tuple[float, ...] = Field(
        default=NOISE_LADDER, description="Rungs of the noise ladder that lanes may ask for."
    )
    region: NoiseRegion = Field(default="random", description="Where noise falls.")
    object_mask: bool = Field(
        default=True,
        description="Keep noise on the part, where the encoder tells it from its ground.",
    )

    @classmethod
    def of(
        cls,
        settings: FitSettings,
        support: Sequence[AnyPath],
        *,
        fingerprint: str,
        seed: int | None = None,
        strengths: Sequence[float] | None = None,
    ) -> "BankSpec":
        """The spec of the bank that a lane with these settings learns from.

        Args:
            settings: of the lane.
            support: files of the support images.
            fingerprint: of the encoder.
            seed: of the bank; None is that of the settings.
            strengths: None is that of the settings alone.

        Raises:
            DataError: a file cannot be read.
        """
        return cls(
            fingerprint=fingerprint,
            support=file_digests(support),
            seed=settings.seed if seed is None else seed,
            strengths=(settings.noise_strength,) if strengths is None else tuple(strengths),
            region=settings.region,
            object_mask=settings.object_mask,
            ground=settings.ground,
            white_level=settings.white_level,
        )

    def suits(self, settings: FitSettings) -> bool:
        """Whether a lane with these settings can learn from the bank."""
        return (
            settings.noise_strength in self.strengths
            and settings.region == self.region
            and settings.object_mask == self.object_mask
            and settings.ground == self.ground
            and settings.white_level == self.white_level
        )

    def check(self, settings: FitSettings) -> None:
        """SettingsError, with what differs, unless the bank `suits` the settings."""
        if not self.suits(settings):
            raise SettingsError(
                f"the anomaly bank was encoded with noise of strength"
                f" {', '.join(map(str, self.strengths))}, region {self.region!r}, object_mask"
                f" {self.object_mask}, ground {self.ground} and white_level {self.white_level}, not"
                f" {settings.noise_strength}, {settings.region!r}, {settings.object_mask},"
                f" {settings.ground} and {settings.white_level}: encode the support set with these"
                f" settings"
            )


def file_digests(paths: Sequence[AnyPath]) -> tuple[str, ...]:
    """The SHA-256 of each file, in hex; DataError if one cannot be read."""
    return tuple(file_sha256(path) for path in paths)


@lru_cache(maxsize=1)
def _code_digest() -> str:
    """Of the code that perturbs and encodes, and of the libraries that compute for it."""
    digest = hashlib.sha256()
    for name in _LIBRARIES:
        digest.update(f"{name} {version(name)}\n".encode())
    for pattern in _CODE:
        for source in sorted(_PACKAGE.glob(pattern)):
            digest.update(source.relative_to(_PACKAGE).as_posix().encode())
            digest.update(hashlib.sha256(source.read_bytes()).digest())
    return digest.hexdigest()
