import pytest
import torch

from apt_ray.anomalies.bank import SupportBank
from apt_ray.anomalies.noise import add_token_noise
from apt_ray.auroc import auroc_of_rows
from apt_ray.config import FitSettings
from apt_ray.detection.rule import anomalous_probability
from apt_ray.errors import SettingsError
from apt_ray.features.clip import FrozenCLIP, load_backbone
from apt_ray.prompts.batches import draw_batches
from apt_ray.prompts.lanes import Lane
from apt_ray.prompts.losses import likeness
from apt_ray.prompts.trainer import PromptTrainer


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


def test_lanes_that_join_and_leave_equal_the_same_lanes_alone(
    backbone: FrozenCLIP, bank: SupportBank
) -> None:
    lanes = [
        _lane(
            bank,
            seed=seed,
            context_length=2 + 3 * seed % 11,
            smgs_weight=(0.0, 1.0)[seed % 2],
            smgs=("projection", "penalty")[seed // 2 % 2],
            anomalous_prompts=1 + seed % 3,
            margin_weight=(0.0, 0.5)[seed % 2],
            steps=(25, 30)[seed % 2],
        )
        for seed in range(20)
    ]
    first, late, paused = lanes[0], lanes[1], lanes[2]
    together = PromptTrainer(backbone, [first, paused, *lanes[3:10]])
    together.advance(7)
    (state,) = together.leave([paused])
    together.join([late, *lanes[10:]])
    together.advance(5)
    together.join([paused], [state])
    together.leave(lanes[3:10])
    together.advance(13)
    assert together.lanes == (first, late, *lanes[10:], paused)
    for lane, steps in ((first, 25), (late, 18), (paused, 20)):
        alone = PromptTrainer(backbone, [lane])
        alone.advance(steps)
        position = together.lanes.index(lane)
        assert torch.allclose(alone.text_features(), together.text_features([lane]), atol=1e-4)
        assert torch.allclose(alone.contexts()[0], together.contexts()[position], atol=1e-4)
        assert torch.allclose(alone.meta_T2E[0], together.meta_T2E[position], atol=1e-4)


def test_a_lane_that_does_not_suit_leaves_the_others_alone(
    backbone: FrozenCLIP, bank: SupportBank
) -> None:
    good = _lane(bank)
    trainer = PromptTrainer(backbone, [good])
    with pytest.raises(SettingsError, match="at most 30"):
        trainer.join([_lane(bank), _lane(bank, context_length=31)])
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


def test_the_smgs_weight_changes_what_is_learned(backbone: FrozenCLIP, bank: SupportBank) -> None:
    # From the meta-prompt's own words the noise leads away from it at once.
    lanes = [_lane(bank, start="states", smgs_weight=weight) for weight in (0.0, 1.0)]
    trainer = PromptTrainer(backbone, lanes)
    trainer.advance(15)
    free, guided = trainer.text_features()
    assert not torch.allclose(free, guided, atol=2e-3)


def test_the_meta_prompt_moves_only_after_a_round(backbone: FrozenCLIP, bank: SupportBank) -> None:
    trainer = PromptTrainer(backbone, [_lane(bank, seed=seed) for seed in range(6)])
    start = trainer.meta_T2E.clone()
    trainer.advance(19)
    assert torch.equal(trainer.meta_T2E, start)


def test_a_finished_lane_stands_still(backbone: FrozenCLIP, bank: SupportBank) -> None:
    trainer = PromptTrainer(backbone, [_lane(bank, steps=5), _lane(bank, steps=10)])
    trainer.advance(5)
    short, long = trainer.contexts()
    trainer.advance(5)
    assert torch.equal(trainer.contexts()[0], short)
    assert not torch.equal(trainer.contexts()[1], long)


def test_a_seed_is_repeatable_and_another_differs(backbone: FrozenCLIP, bank: SupportBank) -> None:
    lanes = [_lane(bank, seed=seed) for seed in (3, 3, 4)]
    trainer = PromptTrainer(backbone, lanes)
    trainer.advance(3)
    first, second, third = trainer.contexts()
    assert torch.allclose(first, second, atol=1e-6)
    assert not torch.allclose(first, third, atol=1e-3)


def test_settings_that_do_not_suit_are_refused(backbone: FrozenCLIP, bank: SupportBank) -> None:
    with pytest.raises(SettingsError, match="at most 30"):
        PromptTrainer(backbone, [_lane(bank, context_length=31)])
    with pytest.raises(SettingsError, match=r"not 0\.8"):
        PromptTrainer(backbone, [_lane(bank, noise_strength=0.8)])
    with pytest.raises(SettingsError, match=r"not 0\.3, 'everywhere' and True"):
        PromptTrainer(backbone, [_lane(bank, region="everywhere")])


def test_a_penalty_and_a_projection_guide_differently(
    backbone: FrozenCLIP, bank: SupportBank
) -> None:
    off, projection, penalty = (
        _lane(bank, smgs_weight=weight, smgs=way)
        for weight, way in ((0.0, "penalty"), (1.0, "projection"), (1.0, "penalty"))
    )
    trainer = PromptTrainer(backbone, [off, projection, penalty])
    trainer.advance(15)
    first, second, third = trainer.text_features()
    assert not torch.allclose(second, third, atol=1e-3)
    assert not torch.allclose(first, third, atol=1e-3)


def test_a_meta_prompt_that_may_not_optimise_itself_stays(
    backbone: FrozenCLIP, bank: SupportBank
) -> None:
    lanes = [_lane(bank, seed=seed, self_optimising=seed % 2) for seed in range(6)]
    trainer = PromptTrainer(backbone, lanes)
    start = trainer.meta_T2E.clone()
    trainer.advance(20)
    assert torch.equal(trainer.meta_T2E[::2], start[::2])


def test_several_anomalous_prompts_are_kept_apart_by_the_penalty(
    backbone: FrozenCLIP, bank: SupportBank
) -> None:
    lanes = [
        _lane(bank, anomalous_prompts=3, diversity_weight=weight, learning_rate=0.1, smgs_weight=0)
        for weight in (0.0, 5.0)
    ]
    trainer = PromptTrainer(backbone, lanes)
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


@pytest.mark.parametrize("noise", ["pixel", "token", "mixed"])
def test_a_batch_is_disturbed_where_its_labels_say_so(bank: SupportBank, noise: str) -> None:
    lane = _lane(bank, noise=noise, noise_strength=0.3)
    # Beside others, some of which read the same noise.
    lanes = [_lane(bank, noise_strength=0.1), lane, _lane(bank, noise_strength=0.3, seed=4)]
    generators = [torch.Generator().manual_seed(number) for number in range(3)]
    tokens_TBNE, labels_TBN = draw_batches(lanes, generators, torch.device("cpu"))
    alone, _ = draw_batches([lane], [torch.Generator().manual_seed(1)], torch.device("cpu"))
    assert torch.equal(tokens_TBNE[1], alone[0])
    tokens_BNE, labels_BN = tokens_TBNE[1], labels_TBN[1]
    assert (labels_BN[:4] == 1).any(1).sum() >= 2
    assert (labels_BN[4:] == 0).all()
    torch.testing.assert_close(
        tokens_BNE.norm(dim=-1), torch.ones(labels_BN.shape), atol=3e-3, rtol=0
    )


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
