import pytest
import torch

from apt_ray.features.clip import FrozenCLIP
from apt_ray.prompts.guidance import (
    ANOMALOUS_STATES,
    META_STEP,
    NORMAL_STATES,
    meta_features,
    move_meta,
    remove_conflict,
    state_contexts,
)
from tests.fakes import FakeBackbone


def _lane(*values: float) -> torch.Tensor:
    return torch.tensor(values).reshape(1, 1, 1, -1)


@pytest.mark.parametrize(
    ("gradient", "guide", "weight", "expected"),
    [
        ((1.0, 0.0), (-1.0, 1.0), 1.0, (0.5, 0.5)),  # c = -1, |h|^2 = 2: g + h / 2
        ((1.0, 0.0), (-1.0, 1.0), 0.5, (0.75, 0.25)),
        ((1.0, 0.0), (-1.0, 1.0), 0.0, (1.0, 0.0)),
        ((1.0, 0.0), (1.0, 1.0), 1.0, (1.0, 0.0)),  # they agree
        ((0.5, 0.0), (0.5, 1.0), 1.0, (0.5, 0.0)),  # a little
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


def test_the_meta_prompt_starts_at_the_mean_of_what_the_states_say() -> None:
    backbone = FakeBackbone()
    meta_2E = meta_features(backbone)
    for side_E, states in zip(meta_2E, (NORMAL_STATES, ANOMALOUS_STATES), strict=True):
        mean_E = sum(backbone.encode_texts([state])[0] for state in states) / len(states)
        torch.testing.assert_close(side_E, mean_E / mean_E.norm())
    assert not torch.allclose(*meta_2E, atol=0.1)


def test_the_meta_prompt_moves_a_tenth_of_the_way() -> None:
    meta = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    learned = torch.tensor([[0, 1.0, 0], [1.0, 0, 0], [0, 0, 1.0]])  # its anomalous sides differ
    moved = move_meta(torch.stack([meta, meta]), torch.stack([learned, learned.roll(1, 0)]))
    to_middle = META_STEP / 2**0.5
    expected = torch.tensor(
        [
            [[1 - META_STEP, META_STEP, 0], [to_middle, 1 - META_STEP, to_middle]],
            [[1 - META_STEP, 0, META_STEP], [to_middle, 1 - META_STEP + to_middle, 0]],
        ]
    )
    torch.testing.assert_close(moved, expected / expected.norm(dim=-1, keepdim=True))


def test_contexts_that_start_at_states_say_what_is_written(backbone: FrozenCLIP) -> None:
    words = backbone.embed_words(ANOMALOUS_STATES[3])
    contexts = state_contexts(backbone, 2, len(words))
    torch.testing.assert_close(contexts[1], words)
    said = backbone.encode_contexts(contexts, torch.full((2,), len(words)))
    torch.testing.assert_close(
        said[1:], backbone.encode_texts([ANOMALOUS_STATES[3]]), atol=1e-4, rtol=1e-4
    )


class Reader(FakeBackbone):
    """Embeds each word as a number, and so can read a context aloud."""

    words = sorted({word for state in NORMAL_STATES + ANOMALOUS_STATES for word in state.split()})

    def embed_words(self, text: str) -> torch.Tensor:
        return torch.tensor([[float(self.words.index(word))] for word in text.split()])

    def read(self, context_LC: torch.Tensor) -> str:
        return " ".join(self.words[int(number)] for number in context_LC[:, 0])


@pytest.mark.parametrize("length", [1, 2, 8, 19])
def test_every_prompt_starts_at_words_of_its_own(length: int) -> None:
    reader = Reader()
    contexts = state_contexts(reader, 8, length)
    assert contexts.shape[:2] == (8, length)
    # Each ends with another state; what stands before it is cut at the front.
    normal, anomalous = (" ".join(states).split() for states in (NORMAL_STATES, ANOMALOUS_STATES))
    ends = [normal.index("without") + 2, *(_end_of(state) for state in (3, 4, 5, 0, 1, 2, 3))]
    for context_LC, words, end in zip(contexts, [normal, *[anomalous] * 7], ends, strict=True):
        assert reader.read(context_LC).split() == (words + words[:end])[-length:]


def _end_of(state: int) -> int:
    """Words up to the end of an anomalous state."""
    return sum(len(text.split()) for text in ANOMALOUS_STATES[: state + 1])


def test_a_context_longer_than_all_states_says_them_again() -> None:
    reader = Reader()
    words = " ".join(NORMAL_STATES[4:] + NORMAL_STATES[:4]).split()
    said = reader.read(state_contexts(reader, 1, 2 * len(words) + 5)[0]).split()
    assert said == words[-5:] + words + words
