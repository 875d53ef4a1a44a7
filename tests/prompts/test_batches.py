"""Batches of a bank whose tokens name the draw or view, and the image and patch, they are from."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from apt_ray.anomalies.bank import SupportBank
from apt_ray.anomalies.noise import add_token_noise
from apt_ray.config import FitSettings
from apt_ray.prompts.batches import draw_batches
from apt_ray.prompts.lanes import Lane
from tests.prompts.banks import DRAWS, PATCHES, SHOTS, VIEWS, random_bank

CLEAN, KINDS = 0, {0.3: 1, 0.6: 2}
"""What the tokens say of themselves first: clean, or of which noise strength."""

NOISY = slice(0, 4)
VIEWED = slice(4, 8)


def _named(kind: int, repeats: int) -> torch.Tensor:
    """Tokens `(kind, image, draw or view, patch)`."""
    places = torch.cartesian_prod(*(torch.arange(n) for n in (SHOTS, repeats, PATCHES)))
    named = F.pad(places, (1, 0), value=kind)
    return named.reshape(SHOTS, repeats, PATCHES, 4).half()


@pytest.fixture
def bank() -> SupportBank:
    return replace(
        random_bank(),
        clean_SVNE=_named(CLEAN, VIEWS),
        noisy_SDNE={strength: _named(kind, DRAWS) for strength, kind in KINDS.items()},
        noisy_views_SD=torch.tensor([[3, 0], [1, 2], [0, 1]]),
    )


def _lane(
    bank: SupportBank,
    images: tuple[int, ...] = (0, 1, 2),
    noise: str = "pixel",
    strength: float = 0.3,
) -> Lane:
    settings = FitSettings.parse({"noise": noise, "noise_strength": strength})
    return Lane(settings=settings, bank=bank, images=images, seed=0)


def _draw(lanes: Sequence[Lane], seeds: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return draw_batches(lanes, generators, torch.device("cpu"))


@pytest.mark.parametrize("images", [(0, 1, 2), (2,), (0, 2)])
def test_a_batch_is_of_draws_and_views_of_the_lanes_images(
    bank: SupportBank, images: tuple[int, ...]
) -> None:
    drawn, viewed = set(), set()
    lane, g = _lane(bank, images, strength=0.6), torch.Generator().manual_seed(0)
    for _ in range(50):
        (tokens_BNE,), (labels_BN,) = draw_batches([lane], [g], torch.device("cpu"))
        assert tokens_BNE.shape == (8, PATCHES, 4)
        assert tokens_BNE.dtype == torch.float32
        assert (tokens_BNE[..., 3] == torch.arange(PATCHES)).all(), "patches stay in their places"
        assert (tokens_BNE[NOISY, :, 0] == KINDS[0.6]).all()
        assert (tokens_BNE[VIEWED, :, 0] == CLEAN).all()
        assert (labels_BN[VIEWED] == 0).all()
        for tokens_NE, labels_N in zip(tokens_BNE[NOISY], labels_BN[NOISY], strict=True):
            ((_, image, draw),) = {tuple(token[:3]) for token in tokens_NE.tolist()}
            assert torch.equal(labels_N, bank.noisy_labels_SDN[int(image), int(draw)])
            drawn.add((int(image), int(draw)))
        viewed |= {tuple(token[1:3]) for token in tokens_BNE[VIEWED].flatten(0, 1).tolist()}
    assert drawn == {(image, draw) for image in images for draw in range(DRAWS)}
    assert viewed == {(image, view) for image in images for view in range(VIEWS)}


def test_each_lane_draws_what_it_draws_alone(bank: SupportBank) -> None:
    other = replace(bank, clean_SVNE=bank.clean_SVNE + 8, noisy_labels_SDN=-bank.noisy_labels_SDN)
    lanes = [
        _lane(bank),
        _lane(other, strength=0.6),
        _lane(bank, (1,), strength=0.6),
        _lane(other, (0, 1), noise="token"),
        _lane(bank, noise="mixed"),
        _lane(bank, (2, 0)),
    ]
    tokens_TBNE, labels_TBN = _draw(lanes, range(6))
    for seed, lane in enumerate(lanes):
        tokens, labels = _draw([lane], [seed])
        assert torch.equal(tokens_TBNE[seed], tokens[0])
        assert torch.equal(labels_TBN[seed], labels[0])
    assert not torch.equal(tokens_TBNE[0], _draw(lanes[:1], [1])[0][0])


@pytest.mark.parametrize(("noise", "on_tokens"), [("token", [0, 1, 2, 3]), ("mixed", [0, 2])])
@pytest.mark.parametrize("strength", KINDS)
def test_token_noise_takes_the_place_of_noisy_pixels(
    bank: SupportBank, noise: str, on_tokens: list[int], strength: float
) -> None:
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        (pixel_BNE,), (labels_BN,) = draw_batches([_lane(bank)], [g], torch.device("cpu"))
        # The view that the noisy pixels were made from, disturbed where they are anomalous.
        image_B, draw_B = pixel_BNE[NOISY, 0, 1].long(), pixel_BNE[NOISY, 0, 2].long()
        view_BNE = bank.clean_SVNE[image_B, bank.noisy_views_SD[image_B, draw_B]]
        disturbed_BNE = add_token_noise(view_BNE, labels_BN[NOISY] == 1, strength, g).float()
        (tokens_BNE,), (same_BN,) = _draw([_lane(bank, noise=noise, strength=strength)], [seed])
        assert torch.equal(labels_BN, same_BN)
        assert torch.equal(tokens_BNE[on_tokens], disturbed_BNE[on_tokens])
        on_pixels = [row for row in range(4) if row not in on_tokens]
        assert (tokens_BNE[on_pixels, :, 0] == KINDS[strength]).all()
        assert torch.equal(tokens_BNE[on_pixels, :, 1:], pixel_BNE[on_pixels, :, 1:])
        assert torch.equal(tokens_BNE[VIEWED], pixel_BNE[VIEWED])
