import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from apt_ray.anomalies.bank import FamilyBank, SupportBank
from apt_ray.anomalies.noise import add_token_noise
from apt_ray.auroc import auroc_of_rows
from apt_ray.config import FitSettings
from apt_ray.detection.rule import anomalous_probability, prompt_log_probabilities
from apt_ray.errors import SettingsError
from apt_ray.features.clip import FrozenCLIP, load_backbone
from apt_ray.prompts.batches import draw_batches
from apt_ray.prompts.guidance import (
    META_STEP,
    ROUND,
    meta_features,
    move_meta,
    remove_conflict,
    state_contexts,
)
from apt_ray.prompts.lanes import Lane, LaneState
from apt_ray.prompts.losses import likeness, margin
from apt_ray.prompts.trainer import PromptTrainer
from tests.fakes import FakeBackbone
from tests.prompts.banks import Image, family_bank, random_bank
from tests.prompts.losses import divergence, synthetic_loss


def _lane(
    bank: SupportBank, seed: int = 0, images: tuple[int, ...] = (0, 1, 2), **settings: float | str
) -> Lane:
    return Lane(
        settings=FitSettings.parse({"steps": 30, "start": "random", **settings}),
        bank=bank,
        images=images,
        seed=seed,
    )


def test_a_lane_alone_equals_the_same_lane_among_sixteen(
    backbone: FrozenCLIP, bank: SupportBank
) -> None:
    lanes = [
        _lane(
            bank,
            seed=seed,
            images=((0, 1), (1, 2), (0, 1, 2))[seed % 3],
            context_length=2 + seed % 7,
            noise_strength=(0.1, 0.3)[seed % 2],
            smgs_weight=(0.0, 0.5, 1.0)[seed % 3],
            learning_rate=(0.01, 0.05)[seed % 2],
        )
        for seed in range(16)
    ]
    together = PromptTrainer(backbone, lanes)
    together.advance(25)
    for position in (0, 5, 15):
        alone = PromptTrainer(backbone, [lanes[position]])
        alone.advance(25)
        assert torch.allclose(
            alone.text_features()[0], together.text_features()[position], atol=1e-4
        )
        assert torch.allclose(alone.contexts()[0], together.contexts()[position], atol=1e-4)
        assert torch.allclose(alone.meta_T2E[0], together.meta_T2E[position], atol=1e-4)


def test_a_lane_that_does_not_suit_leaves_the_others_alone() -> None:
    bank = random_bank()
    good = _lane(bank)
    trainer = PromptTrainer(FakeBackbone(), [good])
    with pytest.raises(SettingsError, match="at most 16"):
        trainer.join([_lane(bank), _lane(bank, context_length=17)])
    assert trainer.lanes == (good,)
    trainer.advance(1)
    assert trainer.steps_done == 1


def test_training_learns_to_separate_the_noise(backbone: FrozenCLIP, bank: SupportBank) -> None:
    trainer = PromptTrainer(backbone, [_lane(bank, steps=60, smgs_weight=0, learning_rate=0.1)])

    def separation() -> float:
        text_PE = trainer.text_features()[0]
        p = anomalous_probability(bank.noisy_SDNE[0.3].float(), text_PE, backbone.constants)
        return float(auroc_of_rows(p.flatten(), bank.noisy_labels_SDN.flatten()))

    before = separation()
    trainer.advance(60)
    assert separation() > max(before, 0.7)


def test_a_finished_lane_stands_still() -> None:
    bank = random_bank()
    trainer = PromptTrainer(FakeBackbone(), [_lane(bank, steps=5), _lane(bank, steps=10)])
    trainer.advance(5)
    short, long = trainer.contexts()
    trainer.advance(5)
    assert torch.equal(trainer.contexts()[0], short)
    assert not torch.equal(trainer.contexts()[1], long)


def test_a_seed_is_repeatable_and_another_differs() -> None:
    bank = random_bank()
    lanes = [_lane(bank, seed=seed) for seed in (3, 3, 4)]
    trainer = PromptTrainer(FakeBackbone(), lanes)
    trainer.advance(3)
    first, second, third = trainer.contexts()
    assert torch.allclose(first, second, atol=1e-6)
    assert not torch.allclose(first, third, atol=1e-3)


def test_settings_that_do_not_suit_are_refused() -> None:
    bank = random_bank()
    with pytest.raises(SettingsError, match="at most 16"):
        PromptTrainer(FakeBackbone(), [_lane(bank, context_length=17)])
    PromptTrainer(FakeBackbone(), [_lane(bank, context_length=16)])
    with pytest.raises(SettingsError, match=r"not 0\.8"):
        PromptTrainer(FakeBackbone(), [_lane(bank, noise_strength=0.8)])
    with pytest.raises(SettingsError, match=r"not 0\.3, 'everywhere', True"):
        PromptTrainer(FakeBackbone(), [_lane(bank, region="everywhere")])


def test_several_anomalous_prompts_are_kept_apart_by_the_penalty() -> None:
    bank = random_bank()
    lanes = [
        _lane(bank, anomalous_prompts=3, diversity_weight=weight, learning_rate=0.1, smgs_weight=0)
        for weight in (0.0, 5.0)
    ]
    trainer = PromptTrainer(FakeBackbone(), lanes)
    trainer.advance(30)
    alike, apart = likeness(trainer.text_features()[:, 1:]).tolist()
    assert apart < alike - 0.05
    assert trainer.contexts()[0].shape[0] == 4


def test_token_noise_falls_on_the_chosen_tokens(bank: SupportBank) -> None:
    tokens = bank.clean_SVNE[0].float()
    chosen = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    chosen[:, :50] = True
    noisy = add_token_noise(tokens, chosen, 0.5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(noisy[:, 50:], tokens[:, 50:], atol=1e-3, rtol=0)
    cosine = (noisy * tokens).sum(-1)[:, :50]
    # The noise is nearly orthogonal to a token, so the angle's tangent is the strength.
    assert cosine.mean().item() == pytest.approx(1 / (1 + 0.5**2) ** 0.5, abs=0.02)


def test_prompts_are_trained_without_the_vision_tower(
    backbone: FrozenCLIP, bank: SupportBank
) -> None:
    text_only = load_backbone(backbone.spec)
    text_only.drop_vision()
    trained = []
    for one in (backbone, text_only):
        trainer = PromptTrainer(one, [_lane(bank)])
        trainer.advance(2)
        trained.append(trainer.text_features())
    assert torch.equal(*trained)


class OrderedBackbone(FakeBackbone):
    """A later vector of a context counts for more, so that none can stand for another."""

    def encode_contexts(self, contexts_TLC: torch.Tensor, lengths_T: torch.Tensor) -> torch.Tensor:
        weight_L1 = 1.0 + torch.arange(contexts_TLC.shape[1])[:, None]
        return super().encode_contexts(contexts_TLC * weight_L1, lengths_T)


def _train(lane: Lane, backbone: FakeBackbone, steps: int) -> torch.Tensor:
    """What one lane's contexts become, written out; its meta-prompt stays."""
    settings, constants = lane.settings, backbone.constants
    g = torch.Generator().manual_seed(lane.seed)
    prompts, length = 1 + settings.anomalous_prompts, settings.context_length
    contexts = backbone.token_std * torch.randn(prompts, length, 4, generator=g)
    if settings.start == "states":
        contexts = state_contexts(backbone, prompts, length)
    norm, velocity, meta = contexts.norm(), 0, meta_features(backbone)
    for step in range(steps):
        tokens, labels = draw_batches([lane], [g], backbone.device)
        contexts = contexts.requires_grad_()
        text = backbone.encode_contexts(contexts, torch.full((prompts,), length))
        (log_p,) = prompt_log_probabilities(tokens, text, constants)
        loss = synthetic_loss(log_p[..., 1:].exp().sum(-1), labels[0])
        if prompts > 2:
            loss = loss + settings.diversity_weight * likeness(text[None, 1:])
        loss = loss + settings.margin_weight * margin(tokens, labels, text[None])
        guide = divergence(prompt_log_probabilities(tokens[0], meta, constants), log_p)
        of_loss, of_guide = (
            torch.autograd.grad(value, contexts, retain_graph=True)[0] for value in (loss, guide)
        )
        if settings.smgs == "penalty":
            gradient = of_loss + settings.smgs_weight * of_guide
        else:
            weight = torch.tensor([settings.smgs_weight])
            (gradient,) = remove_conflict(of_loss[None], of_guide[None], weight)
        velocity = 0.9 * velocity + 0.1 * gradient / gradient.norm()
        decay = (1 + math.cos(math.pi * min(step / settings.steps, 1))) / 2
        contexts = contexts.detach() - settings.learning_rate * decay * norm * velocity
    return contexts


def test_lanes_that_come_and_go_are_trained_as_is_written() -> None:
    backbone = OrderedBackbone()
    banks = [random_bank(seed=seed, strengths=(0.1, 0.3)) for seed in range(2)]
    lanes = [
        _lane(
            banks[number % 2],
            seed=number,
            images=((0, 1), (1, 2), (0, 1, 2))[number % 3],
            start=("random", "states")[number // 2 % 2],
            context_length=1 + 3 * number % 7,
            noise_strength=(0.1, 0.3)[number // 3 % 2],
            smgs_weight=(0.0, 0.5, 1.0)[number % 3],
            smgs=("projection", "penalty")[number // 4 % 2],
            learning_rate=(0.03, 0.1)[number // 5 % 2],
            anomalous_prompts=(1, 1, 1, 2, 3)[number % 5],
            diversity_weight=(0.1, 2.0)[number % 2],
            margin_weight=(0.0, 0.0, 0.7)[number // 7 % 3],
            steps=(8, 30)[number % 2],
            self_optimising=False,
        )
        for number in range(44)
    ]
    trainer = PromptTrainer(backbone, lanes[:20])
    trainer.advance(3)
    paused = trainer.leave([lanes[7], lanes[2]])
    trainer.join(lanes[20:])
    trainer.advance(4)
    trainer.join([lanes[7], lanes[2]], paused)
    trainer.leave(lanes[30:34])
    trainer.advance(3)
    joined = [n for n in (*range(20), *range(20, 44)) if n not in (2, 7, *range(30, 34))]
    expected = [(n, 10 if n < 20 else 7) for n in joined] + [(7, 6), (2, 6)]
    assert trainer.lanes == tuple(lanes[number] for number, _ in expected)
    assert trainer.steps_done == 6
    for (number, steps), ours in zip(expected, trainer.contexts(), strict=True):
        theirs = _train(lanes[number], backbone, steps)
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
        (text_PE,) = trainer.text_features([lanes[number]])
        lengths = torch.full(theirs.shape[:1], theirs.shape[1])
        said = backbone.encode_contexts(theirs, lengths)
        torch.testing.assert_close(text_PE, said, atol=1e-3, rtol=0)


def test_what_leaves_is_all_that_a_lane_needs() -> None:
    bank = random_bank()
    first, second = _lane(bank, context_length=2), _lane(bank, seed=1, anomalous_prompts=2)
    trainer = PromptTrainer(FakeBackbone(), [first, second])
    trainer.advance(2)
    contexts, meta = trainer.contexts(), trainer.meta_T2E
    later, earlier = trainer.leave([second, first])
    assert (trainer.lanes, trainer.steps_done, trainer.contexts()) == ((), 0, [])
    for state, lane_contexts, lane_meta in (
        (earlier, contexts[0], meta[0]),
        (later, contexts[1], meta[1]),
    ):
        assert torch.equal(state.contexts_PLC, lane_contexts)
        assert state.velocity_PLC.shape == lane_contexts.shape
        assert torch.equal(state.meta_2E, lane_meta)
        assert state.steps_done == 2
    trainer.advance(1)  # nobody is there
    assert trainer.steps_done == 0


def test_what_was_given_out_does_not_change_any_more() -> None:
    bank = random_bank()
    stays, goes = _lane(bank), _lane(bank, seed=1)
    trainer = PromptTrainer(FakeBackbone(), [stays, goes])
    trainer.advance(1)
    contexts = trainer.contexts()
    (state,) = trainer.leave([goes])
    trainer.join([goes], [state])
    before = (
        contexts[0].clone(),
        contexts[1].clone(),
        state.velocity_PLC.clone(),
        state.generator.clone(),
    )
    trainer.advance(2)
    assert torch.equal(contexts[0], before[0])
    assert torch.equal(state.contexts_PLC, before[1])
    assert torch.equal(state.velocity_PLC, before[2])
    assert torch.equal(state.generator, before[3])


# What the learned prompts say is far from the meta-prompt in one direction alone: its anomalous
# side moves from the second axis towards the third, and no other.
META = torch.eye(4)[[0, 1]]
LEARNED = torch.eye(4)[[0, 2]]
MOVED = F.normalize(torch.tensor([[1.0, 0, 0, 0], [0, 1 - META_STEP, META_STEP, 0]]), dim=-1)

# The meta-prompt finds both equally anomalous; the moved one finds the first more so.
LIKE_LEARNED = F.normalize(torch.tensor([1.0, 0, 1, 0]), dim=-1)
UNLIKE_LEARNED = F.normalize(torch.tensor([1.0, 0, 0, 1]), dim=-1)
# To the meta-prompt this one is the most anomalous of all, until it has moved twice.
A_LITTLE_LIKE_META = F.normalize(torch.tensor([1.0, 0.16, 0, (1 - 0.16**2) ** 0.5]), dim=-1)


BETTER = [LIKE_LEARNED, UNLIKE_LEARNED, UNLIKE_LEARNED], [1, 0, -1]  # AUROC 0.5 -> 1
WORSE = [LIKE_LEARNED, UNLIKE_LEARNED, UNLIKE_LEARNED], [0, 1, -1]  # 0.5 -> 0
SLIGHTLY_BETTER = [LIKE_LEARNED, LIKE_LEARNED, UNLIKE_LEARNED], [1, 0, 0]  # 0.5 -> 0.75
SLIGHTLY_WORSE = [LIKE_LEARNED, UNLIKE_LEARNED, UNLIKE_LEARNED], [0, 1, 0]  # 0.5 -> 0.25
BETTER_TWICE = [LIKE_LEARNED, UNLIKE_LEARNED, A_LITTLE_LIKE_META], [1, 0, 0]  # 0.25 -> 0.5 -> 1
EQUAL = [UNLIKE_LEARNED, UNLIKE_LEARNED, LIKE_LEARNED], [1, 0, -1]  # 0.5 -> 0.5
ALL_NORMAL = [LIKE_LEARNED, UNLIKE_LEARNED, UNLIKE_LEARNED], [0, 0, 0]  # not a number


def _before_an_attempt(guidance: FamilyBank, steps_done: int = ROUND - 1) -> tuple[Lane, LaneState]:
    """A lane with `LEARNED` prompts and a schedule that is over, so that only its meta-prompt can
    move, one step before it may."""
    settings = FitSettings(steps=1, context_length=1)
    lane = Lane(settings=settings, bank=random_bank(guidance=guidance), images=(0,), seed=0)
    state = LaneState(
        contexts_PLC=LEARNED[:, None],
        velocity_PLC=torch.zeros(2, 1, 4),
        meta_2E=META,
        norm=torch.tensor(1.0),
        generator=torch.Generator().get_state(),
        steps_done=steps_done,
    )
    return lane, state


def _meta_after(lane: Lane, state: LaneState, steps: int = 1) -> torch.Tensor:
    trainer = PromptTrainer(FakeBackbone())
    trainer.join([lane], [state])
    trainer.advance(steps)
    torch.testing.assert_close(trainer.text_features()[0], LEARNED)
    return trainer.meta_T2E[0]


@pytest.mark.parametrize(
    "families",
    [[BETTER], [BETTER, SLIGHTLY_WORSE], [ALL_NORMAL, BETTER]],
    ids=["all", "more than others get worse", "beside one that says nothing"],
)
def test_the_meta_prompt_moves_where_guidance_gets_better(
    families: list[Image],
) -> None:
    guidance = family_bank(*([image] for image in families))
    torch.testing.assert_close(_meta_after(*_before_an_attempt(guidance)), MOVED)


@pytest.mark.parametrize(
    "families",
    [[WORSE], [WORSE, SLIGHTLY_BETTER], [EQUAL], [ALL_NORMAL]],
    ids=["worse", "more worse than others get better", "as good as before", "says nothing"],
)
def test_the_meta_prompt_stays_where_guidance_does_not_get_better(
    families: list[Image],
) -> None:
    guidance = family_bank(*([image] for image in families))
    assert torch.equal(_meta_after(*_before_an_attempt(guidance)), META)


@pytest.mark.parametrize(
    ("images", "moves"), [((0,), True), ((1,), False), ((0, 2), True), ((0, 1, 2), False)]
)
def test_only_images_that_a_lane_may_see_judge_its_meta_prompt(
    images: tuple[int, ...], moves: bool
) -> None:
    lane, state = _before_an_attempt(family_bank([BETTER, WORSE, EQUAL]))
    meta = _meta_after(replace(lane, images=images), state)
    assert torch.equal(meta, META) != moves


def test_each_lane_decides_for_itself_whether_its_meta_prompt_moves() -> None:
    better, worse = (family_bank([image]) for image in (BETTER, WORSE))
    pairs = [_before_an_attempt(guidance) for guidance in (worse, better, worse, better)]
    fixed = pairs[3][0].settings.model_copy(update={"self_optimising": False})
    pairs[3] = replace(pairs[3][0], settings=fixed), pairs[3][1]
    trainer = PromptTrainer(FakeBackbone())
    trainer.join([lane for lane, _ in pairs], [state for _, state in pairs])
    trainer.advance(1)
    torch.testing.assert_close(trainer.meta_T2E, torch.stack([META, MOVED, META, META]))


@pytest.mark.parametrize(
    ("steps_done", "steps", "moves"),
    [(1, ROUND - 2, 0), (1, ROUND - 1, 1), (ROUND, ROUND - 1, 0), (ROUND - 1, ROUND + 1, 2)],
)
def test_the_meta_prompt_may_move_once_after_each_round(
    steps_done: int, steps: int, moves: int
) -> None:
    expected = META
    for _ in range(moves):
        expected = move_meta(expected[None], LEARNED[None])[0]
    lane, state = _before_an_attempt(family_bank([BETTER_TWICE]), steps_done)
    torch.testing.assert_close(_meta_after(lane, state, steps), expected)


def test_a_meta_prompt_that_moves_changes_what_is_learned() -> None:
    """Lanes that differ in nothing but whether their meta-prompt may move, and gets better so."""
    trainer = PromptTrainer(FakeBackbone())
    for judge, self_optimising in ((BETTER_TWICE, True), (EQUAL, True), (BETTER_TWICE, False)):
        lane, state = _before_an_attempt(family_bank([judge]), steps_done=0)
        settings = FitSettings(context_length=1, learning_rate=0.1, self_optimising=self_optimising)
        # From the meta-prompt's own words the noise leads away from it at once.
        state = replace(state, contexts_PLC=META[:, None])
        trainer.join([replace(lane, settings=settings)], [state])
    trainer.advance(3 * ROUND)
    moving, kept, fixed = trainer.text_features()
    torch.testing.assert_close(kept, fixed, atol=1e-4, rtol=0)
    assert not torch.allclose(moving, kept, atol=1e-3)
