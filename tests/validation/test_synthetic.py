import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean, stdev

import pytest
import torch
from sklearn.metrics import roc_auc_score

from apt_ray.anomalies.bank import SupportBank, encode_support
from apt_ray.anomalies.families import SELECTION
from apt_ray.config import FitSettings
from apt_ray.data.folders import Category
from apt_ray.errors import SettingsError
from apt_ray.features.clip import FrozenCLIP
from apt_ray.images import read_image
from apt_ray.prompts.fit import fit
from apt_ray.prompts.lanes import fold, folds
from apt_ray.prompts.trainer import PromptTrainer
from apt_ray.validation.judge import Evidence, Judge, encode_judge
from apt_ray.validation.synthetic import ValidationValue, judge_folds
from tests.fakes import FakeBackbone, bank_spec, judge_spec
from tests.prompts.banks import random_bank

TEXT_PE = torch.eye(4)[:2]


def test_a_fold_never_trains_on_the_image_that_judges_it(bank: SupportBank) -> None:
    assert [fold(bank, image, FitSettings()).images for image in range(3)] == [
        (1, 2),
        (0, 2),
        (0, 1),
    ]


def test_a_value_is_the_mean_over_seeds_and_folds(
    backbone: FrozenCLIP, bank: SupportBank, judge: Judge
) -> None:
    trainer = PromptTrainer(backbone, folds([bank, bank], FitSettings(steps=8)))
    trainer.advance(8)
    value = judge_folds(backbone, trainer.lanes, trainer.text_features(), [judge, judge])
    assert len(value.images) == 6
    assert value.value == pytest.approx(fmean(value.images))
    assert value.sd == pytest.approx(stdev(value.images))
    assert set(value.families) == set(SELECTION)
    assert fmean(value.families.values()) == pytest.approx(value.value)
    assert all(0 < image < 1 for image in value.images)
    assert 0.5 < value.patch < 1


def test_rungs_give_the_same_result_as_one_run(
    backbone: FrozenCLIP, bank: SupportBank, judge: Judge
) -> None:
    settings = FitSettings(steps=8)
    whole, parts = (PromptTrainer(backbone, folds([bank], settings)) for _ in range(2))
    whole.advance(8)
    for _ in range(4):
        parts.advance(2)
        value = judge_folds(backbone, parts.lanes, parts.text_features(), [judge])
    assert value == judge_folds(backbone, whole.lanes, whole.text_features(), [judge])


def test_a_single_support_image_is_judged_by_altered_copies_of_it(
    backbone: FrozenCLIP, category: Category
) -> None:
    images = [read_image(category.good[0])]
    one = encode_support(backbone, images, bank_spec(backbone, 1, strengths=(0.3,)))
    judge = encode_judge(backbone, images, judge_spec(backbone, 1))
    trainer = PromptTrainer(backbone, folds([one], FitSettings(steps=2)))
    trainer.advance(2)
    value = judge_folds(backbone, trainer.lanes, trainer.text_features(), [judge])
    assert len(value.images) > 1
    assert 0.5 < value.value < 1


def evidence(angles_JXN: torch.Tensor, distances_JXM: torch.Tensor) -> Evidence:
    """Tokens at angles between the normal and the anomalous text feature."""
    sides = angles_JXN.cos(), angles_JXN.sin(), 0 * angles_JXN, 0 * angles_JXN
    tokens_JXNE = torch.stack(sides, -1)
    return Evidence(
        tokens_JXNE=tokens_JXNE.half(),
        cls_JXE=tokens_JXNE[:, :, 0].half(),
        layers={0: distances_JXM, 1: 2 * distances_JXM},
    )


def random_judge(shots: int = 3, draws: int = 2, patches: int = 16) -> Judge:
    """Angles, distances and labels at random, perturbed ones higher where they are labelled."""
    g = torch.Generator().manual_seed(0)
    made = len(SELECTION) * draws

    def drawn(images: int) -> torch.Tensor:
        return 0.1 + 0.5 * torch.rand(shots, images, patches, generator=g)

    labels = torch.randint(-1, 2, (shots, made, patches), generator=g).to(torch.int8)
    labels[0, 3] = 0  # nothing to find in it
    raised = 0.1 * (labels == 1)
    return Judge(
        spec=judge_spec(FakeBackbone(), shots),
        families=tuple(SELECTION),
        normal=evidence(drawn(1), drawn(1)),
        perturbed=evidence(drawn(made) + raised, drawn(made) + raised),
        labels_JXN=labels,
        smallest={0: 0.01, 1: 0.01},
        widened=1.0,
    )


def judged(
    judge: Judge, *, layers: tuple[int, ...] | None = None, **settings: float
) -> ValidationValue:
    shots = len(judge.labels_JXN)
    lanes = folds([random_bank(shots=shots)], FitSettings.parse(settings))
    return judge_folds(FakeBackbone(), lanes, TEXT_PE.expand(shots, 2, 4), [judge], layers)


def test_maps_rank_patches_as_scikit_learn_says() -> None:
    judge = random_judge()
    value = judged(judge, reference_weight=0.0)
    found = []
    angles = torch.atan2(judge.perturbed.tokens_JXNE[..., 1], judge.perturbed.tokens_JXNE[..., 0])
    for one_XN, labels_XN in zip(angles, judge.labels_JXN, strict=True):
        rows = []
        for row, labels in zip(one_XN, labels_XN, strict=True):
            known = labels >= 0
            if {0, 1} <= set(labels.tolist()):
                rows.append(roc_auc_score(labels[known], row[known]))
        found.append(fmean(rows))
    # Maps are blurred between patches, which moves a ranking a little.
    assert value.patch == pytest.approx(fmean(found), abs=0.1)


def test_a_value_counts_what_will_be_served_and_nothing_else() -> None:
    judge = random_judge()

    def with_angles(angle: float) -> Judge:
        tokens = torch.tensor([math.cos(angle), math.sin(angle), 0, 0]).half()
        shown = judge.perturbed.tokens_JXNE
        return replace(judge, perturbed=replace(judge.perturbed, tokens_JXNE=0 * shown + tokens))

    def with_distances(distance: float, layer: int) -> Judge:
        layers: Mapping[int, torch.Tensor] = {
            **judge.perturbed.layers,
            layer: torch.full_like(judge.perturbed.layers[layer], distance),
        }
        return replace(judge, perturbed=replace(judge.perturbed, layers=layers))

    alone, far = judged(judge), judged(with_angles(1.4))
    assert far.value > alone.value + 0.01
    assert judged(with_angles(1.4), reference_weight=1.0) == judged(judge, reference_weight=1.0)
    assert judged(with_distances(9, 1)).value > alone.value + 0.01
    assert judged(with_distances(9, 1), layers=(0,)) == judged(judge, layers=(0,))


def test_what_is_harder_to_tell_is_worth_less() -> None:
    """Scores count by how far they are above the normal ones, not by their order alone."""
    judge = random_judge()
    tokens = judge.normal.tokens_JXNE.float()
    angles = torch.atan2(tokens[..., 1], tokens[..., 0]).expand(judge.labels_JXN.shape)
    values = []
    for more in (0.0, 0.1, 0.2, 0.4):
        moved = evidence(angles + more, angles)
        values.append(judged(replace(judge, perturbed=moved), reference_weight=0.0).value)
    assert values[0] == pytest.approx(0.5, abs=0.01)
    assert values == sorted(values)
    assert values[1] < 0.9 < values[-1] < 1


def test_an_image_stands_before_the_memory_of_a_fit_to_the_others(
    backbone: FrozenCLIP, category: Category
) -> None:
    files = category.support_set(3, seed=0)
    images = [read_image(file) for file in files]
    settings = FitSettings(steps=2, reference_copies=0, reference_rotations=1)
    judge = encode_judge(backbone, images, judge_spec(backbone, 3, reference_copies=0))
    others = fit(category.name, files[1:], settings, backbone=backbone)
    features = backbone.encode_in_batches(backbone.preprocess(images[:1]))
    whole = fit(category.name, files, settings, backbone=backbone)
    for layer, found in others.memory.distances(features).items():
        judged_M = judge.normal.layers[layer][0, 0]
        # It comes by way of the size at which images are perturbed.
        assert (judged_M - found[0]).abs().mean() < 0.1 * found.mean()
        assert whole.memory.distances(features)[layer].mean() < 0.9 * found.mean()


def test_a_judge_of_other_images_is_refused() -> None:
    with pytest.raises(SettingsError, match="needs a judge of the same support images"):
        judge_folds(
            FakeBackbone(),
            folds([random_bank(shots=2)], FitSettings()),
            TEXT_PE.expand(2, 2, 4),
            [random_judge(shots=3)],
        )
