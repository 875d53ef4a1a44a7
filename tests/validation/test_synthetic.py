import pytest

from apt_ray.anomalies.bank import SupportBank, encode_support
from apt_ray.anomalies.families import SELECTION
from apt_ray.config import FitSettings
from apt_ray.data.folders import Category
from apt_ray.features.clip import FrozenCLIP
from apt_ray.images import read_image
from apt_ray.prompts.lanes import fold, folds
from apt_ray.prompts.trainer import PromptTrainer
from apt_ray.validation.synthetic import judge_folds
from tests.fakes import bank_spec


def test_a_fold_never_trains_on_the_image_that_judges_it(bank: SupportBank) -> None:
    assert [fold(bank, image, FitSettings()).images for image in range(3)] == [
        (1, 2),
        (0, 2),
        (0, 1),
    ]


def test_a_value_is_the_mean_over_seeds_and_folds(backbone: FrozenCLIP, bank: SupportBank) -> None:
    trainer = PromptTrainer(backbone, folds([bank, bank], FitSettings(steps=8)))
    trainer.advance(8)
    value = judge_folds(backbone, trainer.lanes, trainer.text_features())
    assert trainer.steps_done == 8
    assert len(value.lanes) == 6
    assert value.value == pytest.approx(sum(value.lanes) / 6)
    assert set(value.families) == set(SELECTION)
    assert value.value == pytest.approx((value.pixel + value.image) / 2)
    assert sum(value.families.values()) / len(SELECTION) == pytest.approx(value.value, abs=0.05)
    assert all(0 <= lane <= 1 for lane in value.lanes)
    assert value.sd > 0


def test_rungs_give_the_same_result_as_one_run(backbone: FrozenCLIP, bank: SupportBank) -> None:
    settings = FitSettings(steps=8)
    whole, parts = (PromptTrainer(backbone, folds([bank], settings)) for _ in range(2))
    whole.advance(8)
    for _ in range(4):
        parts.advance(2)
        value = judge_folds(backbone, parts.lanes, parts.text_features())
    assert value == judge_folds(backbone, whole.lanes, whole.text_features())


def test_a_single_support_image_can_be_judged(backbone: FrozenCLIP, category: Category) -> None:
    one = encode_support(
        backbone, [read_image(category.good[0])], bank_spec(backbone, 1, strengths=(0.3,))
    )
    trainer = PromptTrainer(backbone, folds([one], FitSettings(steps=2)))
    trainer.advance(2)
    value = judge_folds(backbone, trainer.lanes, trainer.text_features())
    assert value.sd == 0
    assert 0 <= value.value <= 1
