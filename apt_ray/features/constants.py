"""The constants that turn similarities into probabilities: each backbone has its own."""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class BackboneConstants(BaseModel):
    """Constants that turn a backbone's similarities into patch probabilities.

    With `cos_n` and `cos_a` the cosines of a patch token to the normal and the anomalous text,
    `p_prompt = softmax([dense_scale * cos_n, dense_scale * cos_a + dense_bias])[1]`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dense_scale: float = Field(gt=0, description="Scale of the patch-text cosines.")
    dense_bias: float = Field(description="Added to the anomalous logit.")
    reference_scale: float = Field(gt=0, description="Scale of `reference_probability`.")
    reference_bias: float = Field(description="Bias of `reference_probability`.")
    reference_layers: tuple[int, ...] = Field(
        min_length=1,
        description="Residual blocks, counted from 0, whose output patches are compared.",
    )

    def reference_probability(self, distance: Tensor) -> Tensor:
        """In 0..1, of `distance`, the mean over `reference_layers` of 1 - max cosine to one normal
        image's patches: what pretraining judges the layers by. A prompt set has scales of its
        own."""
        return torch.sigmoid(self.reference_scale * distance + self.reference_bias)


def published_constants(logit_scale: float, blocks: int) -> BackboneConstants:
    """The constants of a published CLIP, whose checkpoint brings none but its logit scale.

    Args:
        logit_scale: of the checkpoint, exponentiated.
        blocks: of its vision tower; the memory reads those at a half and at three quarters.
    """
    return BackboneConstants(
        dense_scale=logit_scale,
        dense_bias=0.0,
        # A cosine distance of 0.25 at even odds: a convention, not a fit.
        reference_scale=20.0,
        reference_bias=-5.0,
        reference_layers=(blocks // 2 - 1, 3 * blocks // 4 - 1),
    )
