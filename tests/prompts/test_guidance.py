import pytest
import torch

from apt_ray.features.clip import FrozenCLIP
from apt_ray.prompts.guidance import (
    ANOMALOUS_STATES,
    META_STEP,
    meta_features,
    move_meta,
    remove_conflict,
    state_contexts,
)


def _lane(*values: float) -> torch.Tensor:
    return torch.tensor(values).reshape(1, 1, 1, -1)


@pytest.mark.parametrize(
    ("gradient", "guide", "weight", "expected"),
    [
        ((1.0, 0.0), (-1.0, 1.0), 1.0, (0.5, 0.5)),  # c = -1, |h|^2 = 2: g + h / 2
        ((1.0, 0.0), (-1.0, 1.0), 0.5, (0.75, 0.25)),
        ((1.0, 0.0), (-1.0, 1.0), 0.0, (1.0, 0.0)),
        ((1.0, 0.0), (1.0, 1.0), 1.0, (1.0, 0.0)),  # they agree
        ((1.0, 0.0), (-1e-7, 0.0), 1.0, (1.0, 0.0)),  # no guidance to speak of
        ((2.0, -3.0), (0.0, 4.0), 1.0, (2.0, 0.0)),
    ],
)
def test_gradient_surgery_equals_the_written_out_example(
    gradient: tuple[float, ...],
    guide: tuple[float, ...],
    weight: float,
    expected: tuple[float, ...],
) -> None:
    changed = remove_conflict(_lane(*gradient), _lane(*guide), torch.tensor([weight]))
    assert changed.flatten().tolist() == pytest.approx(expected)


def test_surgery_acts_on_each_lane_by_itself() -> None:
    g = torch.Generator().manual_seed(0)
    gradient, guide = (torch.randn(8, 2, 3, 5, generator=g) for _ in range(2))
    weight = torch.linspace(0, 1, 8)
    together = remove_conflict(gradient, guide, weight)
    for lane in range(8):
        one = slice(lane, lane + 1)
        assert torch.allclose(
            together[one], remove_conflict(gradient[one], guide[one], weight[one])
        )
    full = remove_conflict(gradient, guide, torch.ones(8))
    assert ((full * guide).flatten(1).sum(1) > -1e-4).all(), "nothing points against the guide"


def test_the_meta_prompt_starts_as_two_unit_vectors(backbone: FrozenCLIP) -> None:
    meta_PE = meta_features(backbone)
    assert meta_PE.shape[0] == 2
    assert torch.allclose(meta_PE.norm(dim=1), torch.ones(2))


def test_the_meta_prompt_moves_a_tenth_of_the_way() -> None:
    moved = move_meta(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]]))
    expected = torch.tensor([1 - META_STEP, META_STEP])
    assert torch.allclose(moved[0, 0], expected / expected.norm())


def test_contexts_that_start_at_states_say_what_is_written(backbone: FrozenCLIP) -> None:
    words = backbone.embed_words(ANOMALOUS_STATES[3])
    contexts = state_contexts(backbone, 2, len(words))
    torch.testing.assert_close(contexts[1], words)
    said = backbone.encode_contexts(contexts, torch.full((2,), len(words)))
    torch.testing.assert_close(
        said[1:], backbone.encode_texts([ANOMALOUS_STATES[3]]), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("length", [1, 2, 8, 30])
def test_every_prompt_starts_at_words_of_its_own(backbone: FrozenCLIP, length: int) -> None:
    contexts = state_contexts(backbone, 4, length)
    assert contexts.shape == (4, length, backbone.token_width)
    if length > 1:
        assert not torch.equal(contexts[0], contexts[1])
        assert not torch.equal(contexts[1], contexts[2])
