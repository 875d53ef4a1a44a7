import pytest
import torch

from apt_ray.backbone import FrozenCLIP
from apt_ray.bank import SupportBank
from apt_ray.config import FitSettings
from apt_ray.errors import SettingsError
from apt_ray.scoring import anomalous_probability, auroc
from apt_ray.training import Lane, PromptTrainer, divergence, synthetic_loss


def _lane(
    bank: SupportBank, seed: int = 0, images: tuple[int, ...] = (0, 1, 2), **settings: float
) -> Lane:
    return Lane(
        settings=FitSettings.parse({"steps": 30, **settings}), bank=bank, images=images, seed=seed
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
        assert torch.allclose(alone.meta_TPE[0], together.meta_TPE[position], atol=1e-4)


def test_lanes_that_join_and_leave_equal_the_same_lanes_alone(
    backbone: FrozenCLIP, bank: SupportBank
) -> None:
    lanes = [
        _lane(
            bank,
            seed=seed,
            context_length=2 + 3 * seed % 11,
            smgs_weight=(0.0, 1.0)[seed % 2],
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
        assert torch.allclose(alone.meta_TPE[0], together.meta_TPE[position], atol=1e-4)


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
        return float(auroc(p.flatten(), bank.noisy_labels_SDN.flatten()))

    before = separation()
    trainer.advance(60)
    assert separation() > max(before, 0.7)


def test_the_smgs_weight_changes_what_is_learned(backbone: FrozenCLIP, bank: SupportBank) -> None:
    trainer = PromptTrainer(backbone, [_lane(bank, smgs_weight=weight) for weight in (0.0, 1.0)])
    trainer.advance(15)
    free, guided = trainer.text_features()
    assert not torch.allclose(free, guided, atol=1e-3)


def test_the_meta_prompt_moves_only_after_a_round(backbone: FrozenCLIP, bank: SupportBank) -> None:
    trainer = PromptTrainer(backbone, [_lane(bank, seed=seed) for seed in range(6)])
    start = trainer.meta_TPE.clone()
    trainer.advance(19)
    assert torch.equal(trainer.meta_TPE, start)


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


def test_settings_that_do_not_suit_are_refused(backbone: FrozenCLIP, bank: SupportBank) -> None:
    with pytest.raises(SettingsError, match="at most 30"):
        PromptTrainer(backbone, [_lane(bank, context_length=31)])
    with pytest.raises(SettingsError, match=r"holds no noise of strength 0\.8"):
        PromptTrainer(backbone, [_lane(bank, noise_strength=0.8)])
