import math

import pytest
import torch
import torch.nn.functional as F

from apt_ray.detection.rule import prompt_log_probabilities
from apt_ray.prompts.losses import (
    divergence,
    gradients_at_text,
    likeness,
    margin,
    synthetic_loss,
)
from tests.fakes import FakeBackbone

LABELS = torch.tensor(
    [
        [[1, 0, -1, 0], [0, 0, 0, 0], [0, -1, 0, -1]],  # the third image says nothing
        [[1, 1, 0, 1], [-1, -1, -1, -1], [0, 1, -1, 0]],
    ]
)
"""Of two lanes of three images of four patches."""


def _log_probabilities(seed: int, prompts: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*LABELS.shape, prompts, generator=g).log_softmax(-1)


def test_the_synthetic_loss_equals_a_written_out_example() -> None:
    # One lane, one image of three patches: anomalous, normal, ignored.
    p = torch.tensor([0.8, 0.4, 0.9])
    log_p = torch.stack([1 - p, p], -1).log()[None, None]
    labels = torch.tensor([[[1, 0, -1]]])
    focal = (-(0.2**2) * torch.log(torch.tensor(0.8)) - 0.4**2 * torch.log(torch.tensor(0.6))) / 2
    dice = 1 - (2 * 0.8 + 1) / ((0.8 + 0.4) + 1 + 1)
    image = -torch.log(torch.tensor(0.9))
    assert synthetic_loss(log_p, labels).item() == pytest.approx(
        (focal + dice + image).item(), rel=1e-5
    )


def test_the_synthetic_loss_of_each_lane_is_over_all_its_images() -> None:
    log_p_TBNP = _log_probabilities(0, prompts=3)
    expected = []
    for log_p_BNP, labels_BN in zip(log_p_TBNP, LABELS, strict=True):
        focal, image = [], []
        covered = total = 0.0
        for log_p_NP, labels_N in zip(log_p_BNP, labels_BN.tolist(), strict=True):
            p_N = [math.exp(first) + math.exp(second) for _, first, second in log_p_NP.tolist()]
            for p, label in zip(p_N, labels_N, strict=True):
                true = {1: p, 0: 1 - p}.get(label)
                if true is not None:
                    focal.append(-((1 - true) ** 2) * math.log(true))
                    total += p + label
                    covered += p * label
            if 1 in labels_N:
                image.append(-math.log(max(p_N)))
            elif set(labels_N) == {0}:
                image.append(-math.log(1 - max(p_N)))
        dice = 1 - (2 * covered + 1) / (total + 1)
        expected.append(sum(focal) / len(focal) + dice + sum(image) / len(image))
    assert synthetic_loss(log_p_TBNP, LABELS).tolist() == pytest.approx(expected, rel=1e-4)


def test_the_synthetic_loss_is_nothing_without_labels_and_finite_where_all_is_certain() -> None:
    nothing = torch.full_like(LABELS, -1)
    assert synthetic_loss(_log_probabilities(0, prompts=2), nothing).tolist() == [0, 0]
    # All is taken for normal: the anomalous patch and its image cost -log(1e-6) each, at most.
    log_p = torch.tensor([0.0, -torch.inf]).expand(1, 1, 2, 2)
    loss = synthetic_loss(log_p, torch.tensor([[[1, 0]]]))
    assert loss.item() == pytest.approx(1.5 * 6 * math.log(10) + 1 - 1 / 2, rel=1e-4)
    # And the other way round.
    loss = synthetic_loss(log_p.flip(-1), torch.tensor([[[0, 0]]]))
    assert loss.item() == pytest.approx(2 * 6 * math.log(10) + 1 - 1 / 3, rel=2e-2)


def test_the_divergence_is_that_of_kullback_and_leibler() -> None:
    meta, learned = torch.tensor([0.7, 0.3]), torch.tensor([0.5, 0.5])
    expected = (meta * (meta / learned).log()).sum().item()
    shape = (1, 1, 1, 2)
    ours = divergence(meta.log().reshape(shape), learned.log().reshape(shape))
    assert ours.item() == pytest.approx(expected)
    assert divergence(meta.log().reshape(shape), meta.log().reshape(shape)).item() == 0


def test_the_divergence_adds_up_the_anomalous_prompts() -> None:
    meta = torch.tensor([0.7, 0.3]).log().reshape(1, 1, 1, 2)
    two = torch.tensor([0.5, 0.5]).log().reshape(1, 1, 1, 2)
    three = torch.tensor([0.5, 0.2, 0.3]).log().reshape(1, 1, 1, 3)
    torch.testing.assert_close(divergence(meta, three), divergence(meta, two))


def test_the_divergence_of_each_lane_is_the_mean_over_its_patches() -> None:
    meta, learned = _log_probabilities(0, prompts=2), _log_probabilities(1, prompts=2)
    expected_TBN = F.kl_div(learned, meta, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(divergence(meta, learned), expected_TBN.flatten(1).mean(1))


@pytest.mark.parametrize("prompts", [2, 3])
def test_gradients_are_those_of_the_losses_of_each_lane(prompts: int) -> None:
    g = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> torch.Tensor:
        return F.normalize(torch.randn(*shape, 5, generator=g), dim=-1)

    tokens_TBNE, meta_T2E = unit(*LABELS.shape), unit(2, 2)
    text_TPE = unit(2, prompts).requires_grad_()
    constants = FakeBackbone().constants.model_copy(update={"dense_bias": -1.5})
    losses, guides = [], []
    for tokens, labels, text, meta in zip(tokens_TBNE, LABELS, text_TPE, meta_T2E, strict=True):
        log_p = prompt_log_probabilities(tokens, text, constants)
        losses.append(synthetic_loss(log_p[None], labels[None]))
        guides.append(divergence(prompt_log_probabilities(tokens, meta, constants)[None], log_p))
    of_losses, of_guides = (
        torch.autograd.grad(torch.cat(values).sum(), text_TPE, retain_graph=True)[0]
        for values in (losses, guides)
    )
    text_TPE = text_TPE.detach()
    ours = gradients_at_text(tokens_TBNE, LABELS, text_TPE, meta_T2E, constants)
    torch.testing.assert_close(ours, (of_losses, of_guides))
    alone = gradients_at_text(tokens_TBNE, LABELS, text_TPE, None, constants)
    torch.testing.assert_close(alone, (of_losses,))


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
