import math

import pytest
import torch
import torch.nn.functional as F

from apt_ray.detection.rule import prompt_log_probabilities
from apt_ray.prompts.losses import gradients_at_text, likeness, margin
from tests.fakes import FakeBackbone
from tests.prompts.losses import divergence, synthetic_loss

LABELS = torch.tensor(
    [
        [[1, 0, -1, 0], [0, 0, 0, 0], [0, -1, 0, -1]],  # the third image says nothing
        [[1, 1, 0, 1], [-1, -1, -1, -1], [0, 1, -1, 0]],
        [[-1, -1, -1, -1], [-1, -1, -1, -1], [-1, -1, -1, -1]],
    ]
)
"""Of three lanes of three images of four patches."""

CONSTANTS = FakeBackbone().constants.model_copy(update={"dense_bias": -1.5})


def _unit(*shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, 5, generator=g, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("prompts", [2, 3, 5])
@pytest.mark.parametrize("repeats", [1, 60], ids=["few patches", "many"])
def test_gradients_are_those_of_the_losses_of_each_lane(prompts: int, repeats: int) -> None:
    labels_TBN = LABELS.repeat(1, 1, repeats)
    tokens_TBNE, meta_T2E = _unit(*labels_TBN.shape), _unit(3, 2, seed=1)
    text_TPE = _unit(3, prompts, seed=2).requires_grad_()
    losses, guides = [], []
    for tokens, labels, text, meta in zip(tokens_TBNE, labels_TBN, text_TPE, meta_T2E, strict=True):
        log_p_BNP = prompt_log_probabilities(tokens, text, CONSTANTS)
        losses.append(synthetic_loss(log_p_BNP[..., 1:].exp().sum(-1), labels))
        guides.append(divergence(prompt_log_probabilities(tokens, meta, CONSTANTS), log_p_BNP))
    of_losses, of_guides = (
        torch.autograd.grad(torch.stack(values).sum(), text_TPE, retain_graph=True)[0]
        for values in (losses, guides)
    )
    text_TPE = text_TPE.detach()
    ours = gradients_at_text(tokens_TBNE, labels_TBN, text_TPE, meta_T2E, CONSTANTS)
    torch.testing.assert_close(ours, (of_losses, of_guides))
    alone = gradients_at_text(tokens_TBNE, labels_TBN, text_TPE, None, CONSTANTS)
    torch.testing.assert_close(alone, (of_losses,))
    assert (ours[0][2] == 0).all(), "no labels, nothing to learn"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_certain_has_finite_gradients(dtype: torch.dtype) -> None:
    tokens = torch.eye(5, dtype=dtype)[:2].expand(1, 1, 2, 5)
    constants = CONSTANTS.model_copy(update={"dense_scale": 1e3})
    for text_PE in (tokens[0, 0], tokens[0, 0].flip(0)):
        for gradient in gradients_at_text(
            tokens, torch.tensor([[[1, 0]]]), text_PE[None], text_PE.flip(0)[None], constants
        ):
            assert gradient.isfinite().all()


def test_the_synthetic_loss_equals_a_written_out_example() -> None:
    # One image of three patches: anomalous, normal, ignored.
    focal = (-(0.2**2) * math.log(0.8) - 0.4**2 * math.log(0.6)) / 2
    dice = 1 - (2 * 0.8 + 1) / ((0.8 + 0.4) + 1 + 1)
    image = -math.log(0.9)
    loss = synthetic_loss(torch.tensor([[0.8, 0.4, 0.9]]), torch.tensor([[1, 0, -1]]))
    assert loss.item() == pytest.approx(focal + dice + image, rel=1e-5)


def test_likeness_is_the_mean_cosine_of_pairs() -> None:
    vectors = F.normalize(torch.tensor([[1.0, 0], [1, 1], [0, 1]]), dim=-1)
    expected = (2 * 0.5**0.5 + 0) / 3
    assert likeness(vectors[None]).item() == pytest.approx(expected)
    opposite = torch.tensor([[1.0, 0], [-1, 0], [1, 0]])
    both = likeness(torch.stack([vectors, opposite]))
    assert both.tolist() == pytest.approx([expected, -1 / 3])


def test_the_margin_counts_good_patches_on_the_wrong_side() -> None:
    text = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    tokens = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]]])
    labels = torch.tensor([[[0, 0, 1]]])
    assert margin(tokens, labels, text).item() == pytest.approx(2**0.5 / 2, rel=1e-3)
    assert margin(tokens[:, :, :1], labels[:, :, :1], text).item() == 0


def test_the_margin_of_each_lane_is_to_the_middle_of_its_anomalous_prompts() -> None:
    up, right, left = (torch.tensor(x) for x in ([0.0, 0, 1], [1.0, 0, 0], [0.0, 1, 0]))
    middle = F.normalize(right + left, dim=-1)
    # Both lanes see, in two images: a token at the middle, one at the normal prompt, one at a
    # single anomalous prompt, one that is ignored.
    tokens = torch.stack([torch.stack([middle, up]), torch.stack([right, middle])])
    labels = torch.tensor([[[0, 0], [0, -1]], [[0, 0], [-1, -1]]])
    text = torch.stack([up, right, left])
    excess = (2**0.5, 0, 2**0.5 - (2 - 2**0.5) ** 0.5)  # distances on the unit sphere
    values = margin(tokens.expand(2, 2, 2, 3), labels, text.expand(2, 3, 3))
    assert values.tolist() == pytest.approx([sum(excess) / 3, sum(excess[:2]) / 2], abs=1e-3)
    assert margin(tokens[None], torch.ones(1, 2, 2), text[None]).tolist() == [0]
