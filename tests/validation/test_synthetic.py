from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from apt_ray.anomalies.bank import FamilyBank, SupportBank, encode_support
from apt_ray.anomalies.families import SELECTION
from apt_ray.config import FitSettings
from apt_ray.data.folders import Category
from apt_ray.errors import SettingsError
from apt_ray.features.clip import FrozenCLIP
from apt_ray.images import read_image
from apt_ray.prompts.lanes import fold, folds
from apt_ray.prompts.trainer import PromptTrainer
from apt_ray.validation.synthetic import judge_folds
from tests.fakes import FakeBackbone, bank_spec
from tests.prompts.banks import random_bank


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
    assert value.value == pytest.approx((value.patch + value.image) / 2)
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


def test_a_value_is_what_scikit_learn_finds_on_the_image_that_a_fold_left_out() -> None:
    """Tokens at random angles between the normal and the anomalous prompt: the score is the angle,
    and an image's score its largest angle."""
    rng = np.random.default_rng(0)
    shots, draws, views, patches = 2, 2, 4, 6
    perturbed_FSDN = rng.uniform(0.2, 1.4, (len(SELECTION), shots, draws, patches))
    labels_FSDN = rng.integers(-1, 2, perturbed_FSDN.shape)
    labels_FSDN[2, 0] = 0  # nothing to find in this family's copies of the first image
    clean_SVN = rng.uniform(0.2, 1.3, (shots, views, patches))

    def tokens(angles: NDArray[np.float64]) -> torch.Tensor:
        sides = np.cos(angles), np.sin(angles), 0 * angles, 0 * angles
        return torch.from_numpy(np.stack(sides, -1)).half()

    bank = replace(
        random_bank(shots=shots),
        selection=FamilyBank(
            names=tuple(SELECTION),
            tokens_FSDNE=tokens(perturbed_FSDN),
            labels_FSDN=torch.from_numpy(labels_FSDN).to(torch.int8),
        ),
        judged_clean_SVNE=tokens(clean_SVN),
    )
    patch_TF, image_TF = np.full((2, shots, len(SELECTION)), np.nan)
    for image in range(shots):
        for place in range(len(SELECTION)):
            angles, labels = perturbed_FSDN[place, image], labels_FSDN[place, image]
            known = labels >= 0
            if labels.max() == 1:
                patch_TF[image, place] = roc_auc_score(labels[known], angles[known])
            scores = [*angles.max(1), *clean_SVN[image].max(1)]
            image_TF[image, place] = roc_auc_score([1] * draws + [0] * views, scores)
    text_TPE = torch.eye(4)[:2].expand(shots, 2, 4)
    value = judge_folds(FakeBackbone(), folds([bank], FitSettings()), text_TPE)
    value_TF = (patch_TF + image_TF) / 2
    assert value.lanes == pytest.approx(np.nanmean(value_TF, 1))
    assert value.value == pytest.approx(np.nanmean(value_TF, 1).mean())
    assert value.sd == pytest.approx(np.nanmean(value_TF, 1).std(ddof=1))
    assert (value.patch, value.image) == pytest.approx((np.nanmean(patch_TF), image_TF.mean()))
    expected = dict(zip(SELECTION, np.nanmean(value_TF, 0), strict=True))
    assert value.families == pytest.approx(expected)
    # The only image of a bank judges the fold that learned from it.
    assert bank.selection is not None
    tokens_FSDNE, labels = bank.selection.tokens_FSDNE[:, 1:], bank.selection.labels_FSDN[:, 1:]
    one = replace(
        random_bank(shots=1),
        selection=replace(bank.selection, tokens_FSDNE=tokens_FSDNE, labels_FSDN=labels),
        judged_clean_SVNE=bank.judged_clean_SVNE[1:],
    )
    alone = judge_folds(FakeBackbone(), folds([one], FitSettings()), text_TPE[1:])
    assert (alone.value, alone.sd) == (pytest.approx(value.lanes[1]), 0)


def test_a_bank_without_what_judges_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"encode the support sets .*judged"):
        judge_folds(
            FakeBackbone(), folds([random_bank()], FitSettings()), torch.eye(4).expand(3, 4, 4)
        )
