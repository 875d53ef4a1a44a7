import pytest
import torch

from apt_ray.anomalies.families import GUIDANCE, SELECTION, VISIBLE_CHANGE, Family, harmless_copies
from apt_ray.anomalies.noise import add_noise, patch_labels
from apt_ray.anomalies.regions import REGIONS, Region, move_onto, random_regions

FAMILIES = {**GUIDANCE, **SELECTION}


def _images(batch: int = 6) -> torch.Tensor:
    """Textured colour images in 0..1."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, 6, 6, generator=g)
    return torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")


def test_the_three_sets_of_families_are_disjoint() -> None:
    assert len(GUIDANCE) == 5
    assert len(SELECTION) == 12
    assert not {id(family) for family in GUIDANCE.values()} & {
        id(family) for family in SELECTION.values()
    }


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_a_family_changes_what_its_mask_says_and_stays_in_range(family: Family) -> None:
    pixels = _images()
    perturbed, mask_BHW = family(pixels, torch.Generator().manual_seed(1))
    change_BHW = (perturbed - pixels).abs().amax(1)
    assert mask_BHW.any()
    assert (change_BHW[mask_BHW] > VISIBLE_CHANGE).all()
    assert (change_BHW[~mask_BHW] <= VISIBLE_CHANGE).all()
    assert perturbed.min() >= 0
    assert perturbed.max() <= 1
    again, _ = family(pixels, torch.Generator().manual_seed(1))
    assert torch.equal(perturbed, again)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_a_gray_image_stays_gray(family: Family) -> None:
    gray = _images().mean(1, keepdim=True).expand(-1, 3, -1, -1)
    perturbed, _ = family(gray, torch.Generator().manual_seed(1))
    assert (perturbed.amax(1) - perturbed.amin(1)).max() < 1e-4


@pytest.mark.parametrize("region", REGIONS, ids=[region.__name__ for region in REGIONS])
def test_regions_are_small_and_never_empty(region: Region) -> None:
    share_B = region(50, (96, 96), torch.Generator().manual_seed(0)).float().mean((1, 2))
    assert share_B.min() > 0
    assert share_B.max() < 0.3


def test_noise_falls_inside_the_mask_and_has_the_stated_strength() -> None:
    g = torch.Generator().manual_seed(0)
    pixels = torch.full((1, 3, 64, 64), 0.5)
    pixels[:, 0] = 0.4  # not gray
    mask_BHW = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask_BHW[:, :32] = True
    noisy = add_noise(pixels, mask_BHW, torch.randn(pixels.shape, generator=g), 0.1)
    change = noisy - pixels
    assert change[:, :, 32:].abs().max() == 0
    assert change[:, :, :32].std().item() == pytest.approx(0.1, rel=0.03)


def test_patch_labels_follow_the_covered_share() -> None:
    mask_BHW = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask_BHW[0, 0, 0:4] = True  # a quarter of the first patch
    mask_BHW[0, 0, 4:7] = True  # less of the second
    assert patch_labels(mask_BHW, (2, 2)).tolist() == [[1, -1, 0, 0]]


def test_random_regions_take_turns() -> None:
    masks_BHW = random_regions(3, (64, 64), torch.Generator().manual_seed(0))
    assert masks_BHW.shape == (3, 64, 64)
    assert masks_BHW.flatten(1).any(1).all()


def test_harmless_copies_resemble_their_image() -> None:
    pixels = _images(2)
    copies = harmless_copies(pixels, 4, torch.Generator().manual_seed(0))
    assert copies.shape == (8, 3, 64, 64)
    own = (copies - pixels.repeat_interleave(4, 0)).abs().mean()
    other = (copies - pixels.flip(0).repeat_interleave(4, 0)).abs().mean()
    assert own < 0.6 * other
    assert own > 0


def test_regions_are_moved_onto_the_object_and_cut_by_it() -> None:
    g = torch.Generator().manual_seed(0)
    objects = torch.zeros(12, 64, 64, dtype=torch.bool)
    objects[:, 40:60, 5:25] = True
    objects[6:] = True
    regions = random_regions(12, (64, 64), g)
    moved = move_onto(regions, objects, g)
    assert (moved & ~objects).sum() == 0
    assert (moved.flatten(1).sum(1) > 0).all()
    assert torch.equal(moved[6:], regions[6:])
