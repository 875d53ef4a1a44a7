import numpy as np
import pytest
import torch

from apt_ray.anomalies.object_mask import object_masks, otsu
from apt_ray.features.clip import FrozenCLIP
from apt_ray.pretraining.generator import generate


def _share(backbone: FrozenCLIP, surface: str) -> torch.Tensor:
    """Of eight images, the share of patches that the masks keep."""
    pairs = generate(torch.arange(8) + 900, size=128, surfaces=(surface,), defect_rate=0.0)
    tokens = backbone.encode_places(pairs.query_P3HW)
    return object_masks(tokens, backbone.grid).float().mean(1)


@pytest.mark.parametrize("part", ["nut", "rod", "flange", "capsule"])
def test_parts_are_told_from_their_ground(backbone: FrozenCLIP, part: str) -> None:
    share_S = _share(backbone, part)
    assert (share_S < 0.6).sum() >= 4
    assert (share_S > 0.03).all()


@pytest.mark.parametrize("surface", ["rough", "weave", "marble", "honeycomb"])
def test_surfaces_are_kept_whole(backbone: FrozenCLIP, surface: str) -> None:
    assert (_share(backbone, surface) == 1).sum() >= 7


def test_otsu_parts_two_groups() -> None:
    threshold, separation = otsu(np.array([0.1, 0.2, 0.15, 0.9, 1.0]))
    assert 0.2 < threshold < 0.9
    assert separation > 0.95
    assert otsu(np.zeros(4)) == (0.0, 0.0)
