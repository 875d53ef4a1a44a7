"""Anomaly banks whose tokens a test writes down, four numbers each, as `FakeBackbone` has them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from apt_ray.anomalies.bank import FamilyBank, SupportBank
from apt_ray.features.protocol import ImageFeatures
from tests.fakes import FakeBackbone, bank_spec

SHOTS, DRAWS, VIEWS, PATCHES, WIDTH = 3, 2, 4, 6, 4
LABELS = torch.tensor([[1, 1, 0, 0, 0, -1], [0, 0, 1, 0, -1, 0]])
"""Of the two noisy draws of every image."""

Image = tuple[list[torch.Tensor], list[int]]
"""The tokens of an image's patches, and their labels."""


def random_bank(
    *,
    seed: int = 0,
    shots: int = SHOTS,
    strengths: Sequence[float] = (0.3,),
    guidance: FamilyBank | None = None,
) -> SupportBank:
    """Random tokens of unit length, anomalous ones apart from the others."""
    g = torch.Generator().manual_seed(seed)
    normal, anomalous = torch.tensor([2.0, 0, 0, 1]), torch.tensor([1.0, 1, 1, 1])

    def tokens(*shape: int, around: torch.Tensor = normal) -> torch.Tensor:
        return F.normalize(around + torch.randn(*shape, WIDTH, generator=g), dim=-1).half()

    labels_SDN = LABELS.to(torch.int8).expand(shots, DRAWS, PATCHES)
    clean_SVNE = tokens(shots, VIEWS, PATCHES)
    noisy_SDNE = {}
    for strength in strengths:
        undisturbed, disturbed = (
            tokens(shots, DRAWS, PATCHES, around=around) for around in (normal, anomalous)
        )
        noisy_SDNE[strength] = torch.where(labels_SDN[..., None] != 0, disturbed, undisturbed)
    return SupportBank(
        spec=bank_spec(FakeBackbone(), shots, strengths=strengths),
        support=ImageFeatures(
            tokens_BNE=clean_SVNE[:, 0].float(), cls_BE=clean_SVNE[:, 0, 0].float(), layers={}
        ),
        objects_SN=torch.ones(shots, PATCHES, dtype=torch.bool),
        clean_SVNE=clean_SVNE,
        noisy_SDNE=noisy_SDNE,
        noisy_labels_SDN=labels_SDN,
        noisy_views_SD=torch.randint(VIEWS, (shots, DRAWS), generator=g),
        guidance=guidance or family_bank([([normal, anomalous], [0, 1])] * shots),
    )


def family_bank(*families: Sequence[Image]) -> FamilyBank:
    """One draw of each image of each family."""
    tokens_FSNE = torch.stack(
        [torch.stack([torch.stack(tokens) for tokens, _ in images]) for images in families]
    )
    labels_FSN = torch.tensor([[labels for _, labels in images] for images in families])
    return FamilyBank(
        names=tuple(f"family {number}" for number in range(len(families))),
        tokens_FSDNE=tokens_FSNE[:, :, None].half(),
        labels_FSDN=labels_FSN[:, :, None].to(torch.int8),
    )
