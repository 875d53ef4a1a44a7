from apt_ray.config import FitSettings
from apt_ray.prompts.lanes import fold, folds
from tests.prompts.banks import random_bank


def test_a_fold_learns_from_all_images_but_one_by_a_seed_of_its_own() -> None:
    bank, settings = random_bank(), FitSettings(seed=7)
    folds = [fold(bank, left_out, settings) for left_out in range(3)]
    assert [lane.images for lane in folds] == [(1, 2), (0, 2), (0, 1)]
    assert [lane.seed for lane in folds] == [7, 8, 9]
    assert all(lane.bank is bank and lane.settings is settings for lane in folds)


def test_the_only_image_is_learned_from_though_it_is_left_out() -> None:
    assert fold(random_bank(shots=1), 0, FitSettings()).images == (0,)


def test_folds_are_those_of_every_bank_in_order() -> None:
    banks, settings = [random_bank(), random_bank(shots=2)], FitSettings()
    lanes = folds(banks, settings)
    assert [(lane.bank, lane.images) for lane in lanes] == [
        (bank, fold(bank, image, settings).images) for bank in banks for image in range(bank.shots)
    ]
