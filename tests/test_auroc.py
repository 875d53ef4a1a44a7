import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from apt_ray.auroc import auroc, auroc_of_counts, auroc_of_rows


def test_batched_auroc_equals_scikit_learn_with_ties_and_ignored_entries() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 8, (5, 200), generator=g).float()
    labels = torch.randint(-1, 2, (5, 200), generator=g)
    ours = auroc_of_rows(scores, labels)
    for row in range(5):
        known = labels[row] >= 0
        theirs = roc_auc_score(labels[row][known], scores[row][known])
        assert ours[row].item() == pytest.approx(theirs)


def test_auroc_without_one_of_the_two_classes_is_not_a_number() -> None:
    assert auroc_of_rows(torch.rand(1, 4), torch.zeros(1, 4)).isnan().all()


def test_all_forms_are_one_number_with_ties_counted_half() -> None:
    normal, anomalous = np.array([1.0, 2.0, 2.0, 5.0]), np.array([2.0, 3.0])
    # Of the pairs with 2: one below, two ties; with 3: three below.
    expected = (1 + 2 * 0.5 + 3) / 8
    assert auroc(normal, anomalous) == expected
    scores = torch.tensor([*normal, *anomalous, 9.0])
    labels = torch.tensor([0, 0, 0, 0, 1, 1, -1])
    assert auroc_of_rows(scores, labels).item() == expected
    levels = np.array([1.0, 2.0, 3.0, 5.0])
    normal_1H, anomalous_1H = (
        (values[:, None] == levels).sum(0, dtype=np.float64)[None] for values in (normal, anomalous)
    )
    assert auroc_of_counts(normal_1H, anomalous_1H)[0] == expected
    # A sample drawn twice weighs twice.
    twice = auroc(np.array([1.0, 1.0, 2.0, 2.0, 5.0]), anomalous)
    weighted = auroc_of_counts(np.array([[2.0, 2.0, 0.0, 1.0]]), anomalous_1H)
    assert weighted[0] == pytest.approx(twice)
    both = auroc_of_counts(
        np.array([[2.0, 2.0, 0.0, 1.0], normal_1H[0]]), np.repeat(anomalous_1H, 2, 0)
    )
    assert both.tolist() == [weighted[0], expected], "each resample by itself"


def test_leading_dimensions_stay_and_broadcast() -> None:
    scores = torch.rand(3, 1, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1] * 5, [1, 0] * 5])
    values = auroc_of_rows(scores, labels)
    assert values.shape == (3, 2)
    assert torch.allclose(values[:, 0], 1 - values[:, 1])
