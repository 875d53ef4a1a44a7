import pytest
import torch

from apt_ray.prompts.losses import divergence, likeness, margin, synthetic_loss


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


def test_likeness_is_the_mean_cosine_of_pairs() -> None:
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 1], [0, 1]]), dim=-1)
    expected = (2 * 0.5**0.5 + 0) / 3
    assert likeness(vectors[None]).item() == pytest.approx(expected)


def test_the_margin_counts_good_patches_on_the_wrong_side() -> None:
    text = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    tokens = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]]])
    labels = torch.tensor([[[0, 0, 1]]])
    assert margin(tokens, labels, text).item() == pytest.approx(2**0.5 / 2, rel=1e-3)
    assert margin(tokens[:, :, :1], labels[:, :, :1], text).item() == 0
