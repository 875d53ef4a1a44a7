"""The frozen, validated settings: which backbone, and how one prompt set is fitted."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from apt_ray.errors import SettingsError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

NOISE_LADDER = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
"""The noise strengths that an anomaly bank can hold: standard deviations of pixels in 0..1."""

CATEGORY_NAME = "[A-Za-z0-9_-]+"
"""What may name a category: folders, registered models and addresses carry its name as it is."""

MAX_DAYS = 36_500
"""The longest time that pruning a registry reckons with."""

BUILTIN = "builtin"

TRUNK_STAGES, TRUNK_INPUT_SIZE, TRUNK_POOL = (2, 4), 320, 1
"""What the trunk is read at by default: 40 channels at an eighth of the size and 112 at a
sixteenth, of an image of so many pixels a side, averaged over so many places."""

BACKBONE, TRUNK, TIMM = "backbone", "trunk", "timm:"
"""What the name of a model of timm follows, where it is the reference encoder."""

Precision = Literal["float32", "bfloat16"]

Ground = Annotated[str, StringConstraints(pattern="^(white|black|gray|#[0-9a-fA-F]{6})$")]
"""What transparency is laid on."""

NoiseRegion = Literal["random", "everywhere"]
_OLDER_REGIONS = (("object", "everywhere"),)

SomeSettings = TypeVar("SomeSettings", bound="Settings")


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys refused, errors that name the valid range."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def parse(cls: type[SomeSettings], values: Mapping[str, Any]) -> SomeSettings:
        """Settings from plain values; SettingsError names every value that is not accepted."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = "; ".join(map(_described, error.errors()))
            raise SettingsError(f"invalid settings: {problems}") from None


class OperatorThreshold(Settings):
    """What a person decided last about the threshold of a category, kept in the registry.

    It stands above that of any version and of any fleet file.
    """

    value: float | None = Field(ge=0, le=1, description="None: theirs hold again.")
    reason: str
    by: str = Field(description="Who decided.")
    at: str = Field(description="When, ISO 8601 in UTC.")


def _described(problem: "ErrorDetails") -> str:
    # Pydantic's own names, of a member of a union or of a key as such, are in brackets.
    place = ".".join(str(part) for part in problem["loc"] if "[" not in str(part))
    given, remedy = problem["input"], ""
    if problem["type"] == "string_type" and not isinstance(given, dict | list | tuple | None):
        remedy = ": quote it"
    return f"{place or 'it'}: {problem['msg']}{remedy} (got {given!r})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """How a setting is spelt on the command line, where that is not plainly its name.

    It stands in the field's annotation: `steps: Annotated[int, Flag(names=("--max-steps",))]`.

    Attributes:
        names: The flag and its synonyms; empty means `--` and the field's name.
        metavar: What stands for the value in the help; None is the last word of the flag.
        older: Former values of a choice, each with what it is called now.
    """

    names: tuple[str, ...] = ()
    metavar: str | None = None
    older: tuple[tuple[str, str], ...] = ()


class BackboneSpec(Settings):
    """Which vision-language model, and how its patch tokens are read. Stored in each prompt set."""

    name: Annotated[str, Flag(names=("--backbone",), metavar="NAME")] = Field(
        default=BUILTIN, description="'builtin', or a CLIP ViT of open_clip, e.g. ViT-B-16."
    )
    pretrained: str | None = Field(
        default=None, description="A pretrained tag of open_clip, or a local checkpoint file."
    )
    quick_gelu: bool | None = Field(
        default=None,
        description="Whether a checkpoint file was trained with QuickGELU (OpenAI's weights were).",
    )
    input_size: int | None = Field(
        default=None, gt=0, description="Pixels a side; None is the model's native size."
    )
    tiles: int = Field(
        default=1,
        ge=1,
        le=8,
        description="Each image is cut into so many tiles a side, each seen at the input size:"
        " smaller defects, tiles x tiles the time.",
    )
    precision: Precision = Field(
        default="float32",
        description="Arithmetic of both towers. bfloat16 is several times faster on GPUs and on"
        " CPUs that multiply it (AVX-512 BF16, AMX), and far slower on others.",
    )
    attention: Literal["locality", "ordinary", "value_value"] = Field(
        default="locality",
        description="How patches attend to one another: in windows, as trained, or by their"
        " values.",
    )
    locality_radius: int = Field(
        default=3, ge=1, description="Radius of the attention window, in patches."
    )
    locality_blocks: int = Field(
        default=1, ge=1, description="How many of the last blocks use the window."
    )
    reference_encoder: str | None = Field(
        default=None,
        pattern=f"^({BACKBONE}|{TRUNK}|{TIMM}.+)$",
        description="What the reference memory reads: backbone, its own blocks; trunk, an"
        " EfficientNet-Lite0 trained on photographs; or timm:NAME, any model of timm, with"
        " pretrained weights as timm:NAME.TAG. None is the trunk beside the built-in backbone, and"
        " any other backbone itself.",
    )
    reference_pretrained: str | None = Field(
        default=None,
        description="A checkpoint file for timm:NAME, of safetensors or torch, at the same path on"
        " every machine; None downloads the weights of its tag from the Hugging Face hub, once.",
    )
    reference_layers: tuple[int, ...] | None = Field(
        default=None,
        description="Blocks of a ViT, or stages of a CNN (from 0), whose features the reference"
        " memory holds; None is the encoder's default.",
    )
    reference_lengths: bool = Field(
        default=True,
        description="Whether the memory of a CNN also compares how strongly places answer in its"
        " last stage, beside directions.",
    )
    reference_input_size: int | None = Field(
        default=None,
        gt=0,
        description="Pixels a side that a reference encoder beside the backbone sees; None is 320"
        " for a CNN, near 448 for a ViT, or the only size that it takes.",
    )
    reference_pool: int | None = Field(
        default=None,
        ge=1,
        le=9,
        description="Places a side over which its features are averaged, an odd number; None is 1.",
    )

    @field_validator("pretrained", "reference_pretrained", mode="before")
    @classmethod
    def _file_name(cls, value: object) -> object:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("reference_layers", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """A search space and a trial's record say "2,4"."""
        return tuple(value.split(",")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _of_another_encoder(self) -> "BackboneSpec":
        if self.reference_pool is not None and self.reference_pool % 2 == 0:
            raise ValueError("reference_pool must be an odd number")
        if self.reads == BACKBONE and self.reference_input_size is not None:
            raise ValueError(
                "the backbone reads itself at its own size: set reference_encoder to 'trunk' or"
                " 'timm:NAME', or leave reference_input_size out"
            )
        if self.reference_pretrained is not None and not self.reads.startswith(TIMM):
            raise ValueError(
                "reference_pretrained is a file for a model of timm: set reference_encoder to"
                " 'timm:NAME', or leave it out"
            )
        return self

    @property
    def reads(self) -> str:
        """The reference encoder: as it was named, or the default."""
        return self.reference_encoder or (TRUNK if self.name == BUILTIN else BACKBONE)


class FitSettings(Settings):
    """How one prompt set is fitted. The defaults need no tuning; a search varies some of them.

    Why each default is what it is stands in docs/method.md.
    """

    context_length: int = Field(
        default=8, ge=1, le=32, description="Learnable vectors in each prompt context."
    )
    start: Literal["states", "random"] = Field(
        default="states",
        description="Where the contexts start: at the words of the meta-prompt, or at random.",
    )
    noise_strength: float = Field(
        default=0.3,
        description=f"Standard deviation of the pixel noise, one of {NOISE_LADDER}.",
        json_schema_extra={"enum": list(NOISE_LADDER)},
    )
    smgs_weight: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="How strongly the meta-prompt guides: by projection the share of the"
        " conflicting gradient that is removed, as a penalty its weight in the loss; 0 is off.",
    )
    learning_rate: float = Field(
        default=0.03,
        gt=0,
        le=1,
        description="First step's length as a fraction of the contexts' initial norm.",
    )
    smgs: Literal["projection", "penalty"] = Field(
        default="projection", description="How the meta-prompt guides the gradient."
    )
    self_optimising: bool = Field(
        default=True, description="Whether the meta-prompt follows what was learned."
    )
    anomalous_prompts: int = Field(
        default=1, ge=1, le=8, description="Anomalous prompts; their probabilities add up."
    )
    diversity_weight: float = Field(
        default=0.1, ge=0, description="Penalty on anomalous prompts that are alike."
    )
    margin_weight: float = Field(
        default=0.0,
        ge=0,
        description="Weight of PromptAD's margin: good patches nearer to the normal prompt.",
    )
    noise: Literal["pixel", "token", "mixed"] = Field(
        default="pixel",
        description="What noise is added to: pixels, patch tokens (then relative to their"
        " length), or either in turn.",
    )
    region: Annotated[NoiseRegion, Flag(older=_OLDER_REGIONS)] = Field(
        default="random", description="Where noise falls: in random regions, or everywhere."
    )
    object_mask: bool = Field(
        default=True,
        description="Keep noise on the part, where the backbone tells it from its ground.",
    )
    steps: int = Field(default=100, ge=1, le=100_000, description="Optimisation steps.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of contexts, noise and batches.")
    reference_weight: float = Field(
        default=0.85, ge=0, le=1, description="0 uses the prompts only, 1 the reference only."
    )
    reference_copies: int = Field(
        default=4,
        ge=0,
        le=16,
        description="Copies of each support image in the reference memory, slightly turned,"
        " shifted, enlarged and relit.",
    )
    reference_rotations: Literal[1, 4, 8] = Field(
        default=1,
        description="Turns of each support image in the reference memory: 4 by 90, 8 by 45"
        " degrees. A single support image is always turned by 90 degrees, and mirrored.",
    )
    reference_size: int = Field(
        default=768,
        ge=1,
        description="Patches of a layer in the reference memory at most; a coreset of more.",
    )
    cls_weight: float = Field(
        default=0.0, ge=0, le=1, description="Share of the whole-image prompt score in the score."
    )
    false_alarm_rate: float = Field(
        default=0.05, gt=0, lt=1, description="Share of good parts that may be rejected."
    )

    ground: Ground = Field(
        default="white",
        description="What transparency is laid on: white, black, gray, or a colour as #RRGGBB.",
    )
    white_level: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="The white of 16-bit files that do not say theirs, such as 4095 of a camera of"
        " 12 bits; None is the least of 255, 1023, 4095, 16383 and 65535 that no support image"
        " exceeds.",
    )

    @field_validator("region", mode="before")
    @classmethod
    def _older_name(cls, value: Any) -> Any:
        """Prompt sets written by version 0.1 say "object" for "everywhere"."""
        return dict(_OLDER_REGIONS).get(value, value) if isinstance(value, str) else value

    @field_validator("noise_strength")
    @classmethod
    def _on_the_ladder(cls, value: float) -> float:
        if value not in NOISE_LADDER:
            raise ValueError(f"must be one of {NOISE_LADDER}")
        return value
