import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from apt_ray.errors import SettingsError
from apt_ray.features.builtin.apt_mini import load_builtin
from apt_ray.pretraining.__main__ import main
from apt_ray.pretraining.captions import (
    ANOMALOUS_STATES,
    NORMAL_STATES,
    Phrase,
    Vocabulary,
    draw_phrases,
    holds,
    state_phrase,
)
from apt_ray.pretraining.defects import DEFECTS
from apt_ray.pretraining.draws import Draws
from apt_ray.pretraining.features import encode_images, position_embedding
from apt_ray.pretraining.generator import (
    DEFECT_NAMES,
    SURFACE_NAMES,
    Attribute,
    generate,
)
from apt_ray.pretraining.losses import known_labels, participation_ratio
from apt_ray.pretraining.measuring import (
    PRIOR,
    HeldOut,
    encode_held_out,
    fit_constants,
    measure,
    state_features,
)
from apt_ray.pretraining.settings import TrainSettings
from apt_ray.pretraining.surfaces import SURFACES
from apt_ray.pretraining.train import Pretraining

TINY = TrainSettings(
    steps=4,
    batch_pairs=3,
    sizes={0.0: 32, 0.5: 40},
    phrases=8,
    state_phrases=2,
    free_texts=2,
)
ROUNDING = 2 / 255


def test_random_numbers_are_uniform_and_independent_of_the_batch() -> None:
    seeds = torch.arange(64)
    numbers = Draws.from_seeds(seeds).uniform(1000)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.01)
    assert numbers.std().item() == pytest.approx(12**-0.5, abs=0.01)
    assert torch.corrcoef(numbers).triu(1).abs().max() < 0.2
    assert torch.equal(Draws.from_seeds(seeds[7:9]).uniform(1000), numbers[7:9])


def test_forks_and_successive_draws_differ() -> None:
    draws = Draws.from_seeds(torch.arange(2))
    first, second = draws.uniform(8), draws.uniform(8)
    assert not torch.equal(first, second)
    assert not torch.equal(draws.fork(0).uniform(8), draws.fork(1).uniform(8))
    assert torch.equal(draws.fork(0).uniform(8), draws.fork(0).uniform(8))


def test_a_pair_is_reproducible_from_its_seed_in_any_batch() -> None:
    together = generate(torch.arange(12), size=64)
    alone = generate(torch.tensor([9]), size=64)
    torch.testing.assert_close(alone.query_P3HW[0], together.query_P3HW[9], atol=1e-3, rtol=0)
    torch.testing.assert_close(
        alone.reference_P3HW[0], together.reference_P3HW[9], atol=1e-3, rtol=0
    )
    assert torch.equal(alone.mask_PHW[0], together.mask_PHW[9])
    assert torch.equal(alone.attributes_PA[0], together.attributes_PA[9])


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_changes_the_picture_inside_its_mask_only(defect: str) -> None:
    seeds = torch.arange(8) + 1000
    marked = generate(seeds, size=64, defects=(defect,), defect_rate=1.0)
    clean = generate(seeds, size=64, defects=(defect,), defect_rate=0.0)
    assert torch.equal(marked.reference_P3HW, clean.reference_P3HW)
    change = (marked.query_P3HW - clean.query_P3HW).abs().amax(1)
    blurred = max_pool2d(marked.mask_PHW[:, None].float(), 11, stride=1, padding=5)[:, 0] > 0
    assert (change[~blurred] == 0).all(), "but for defocus and sharpening, five pixels at most"
    drawn = marked.mask_PHW.flatten(1).any(1)
    assert drawn.sum() >= 4
    for picture, mask in zip(change[drawn], marked.mask_PHW[drawn], strict=True):
        assert picture[mask].square().mean().sqrt() > ROUNDING
    assert not clean.mask_PHW.any()


@pytest.mark.parametrize("surface", SURFACES)
def test_every_surface_shows_pairs_of_one_style_and_stays_in_range(surface: str) -> None:
    pairs = generate(torch.arange(8), size=64, surfaces=(surface,), defect_rate=0.0)
    for images in (pairs.reference_P3HW, pairs.query_P3HW):
        assert torch.isfinite(images).all()
        assert images.amin() >= 0
        assert images.amax() <= 1
        assert (images.flatten(1).std(1) > 0.002).all()
    assert not torch.equal(pairs.reference_P3HW, pairs.query_P3HW)
    reference, query = pairs.reference_P3HW.mean((2, 3)), pairs.query_P3HW.mean((2, 3))
    between_pairs = (reference - query.roll(1, 0)).abs().mean()
    assert (reference - query).abs().mean() < 0.7 * between_pairs


def test_attributes_say_what_was_drawn() -> None:
    pairs = generate(
        torch.arange(64), size=64, surfaces=("wood",), defects=("pit",), defect_rate=0.5
    )
    attributes = pairs.attributes_PA
    is_anomalous = pairs.mask_PHW.flatten(1).any(1)
    assert 0 < is_anomalous.sum() < 64
    assert (attributes[:, Attribute.SURFACE] == SURFACE_NAMES.index("wood")).all()
    assert torch.equal(attributes[:, Attribute.STATE] == 1, is_anomalous)
    pit = 1 + DEFECT_NAMES.index("pit")
    assert torch.equal(attributes[:, Attribute.DEFECT] == pit, is_anomalous)
    assert (attributes[~is_anomalous, Attribute.STATE :] == 0).all()
    darker = attributes[is_anomalous, Attribute.POLARITY] == 1
    assert darker.float().mean() > 0.5


def test_masks_are_turned_with_the_pictures() -> None:
    pairs = generate(torch.arange(32), size=64, surfaces=("smooth",), defects=("pit",))
    seen = pairs.attributes_PA[:, Attribute.PLACE]
    assert len(seen.unique()) > 4


def test_states_with_a_preposition_go_behind_the_noun() -> None:
    assert state_phrase("flawless", "a photo of a {} part") == "a photo of a flawless part"
    assert state_phrase("with a defect", "a {} surface") == "a surface with a defect"
    assert state_phrase("without damage", "{}") == "without damage"
    assert len(NORMAL_STATES) == len(ANOMALOUS_STATES) == 8


def test_a_phrase_holds_where_all_that_it_requires_does() -> None:
    crack, stain = (1 + DEFECT_NAMES.index(name) for name in ("crack", "stain"))
    table = torch.zeros(3, len(Attribute), dtype=torch.int64)
    table[1, Attribute.STATE], table[1, Attribute.DEFECT] = 1, crack
    table[2, Attribute.STATE], table[2, Attribute.DEFECT] = 1, stain
    table[2, Attribute.EXTENT] = 3
    everything_but_crack = frozenset(range(1 + len(DEFECT_NAMES))) - {crack}
    phrases = [
        Phrase("a flawless part", {Attribute.STATE: frozenset((0,))}),
        Phrase("a crack", {Attribute.DEFECT: frozenset((crack,))}),
        Phrase("no crack", {Attribute.DEFECT: everything_but_crack}),
        Phrase(
            "a large stain",
            {Attribute.DEFECT: frozenset((stain,)), Attribute.EXTENT: frozenset((3,))},
        ),
    ]
    expected = [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1]]
    assert holds(phrases, table).long().tolist() == expected


def test_drawn_phrases_are_many_and_often_true() -> None:
    attributes = generate(torch.arange(16), size=32).attributes_PA
    phrases = draw_phrases(random.Random(0), attributes, 300)
    assert len({phrase.text for phrase in phrases}) > 150
    true_of_some = holds(phrases, attributes).any(0)
    assert 0.5 < true_of_some.float().mean() < 1


def test_patches_that_a_mask_barely_touches_have_no_label() -> None:
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[0, :4, :4] = True
    mask[0, 0, 8] = True
    labels = known_labels(mask, 8)
    assert labels[0, 0] == 1
    assert labels[0, 1].isnan()
    assert labels[0, 2:].tolist() == [0, 0]


def test_the_participation_ratio_counts_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4000, 16, generator=generator)
    features[:, 5:] = 0
    assert participation_ratio(features).item() == pytest.approx(5, rel=0.02)


def test_the_towers_in_training_are_open_clips_towers() -> None:
    run = Pretraining(TINY)
    model = run.trained_model().eval()
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (model.visual.image_mean, model.visual.image_std)
    )
    with torch.no_grad():
        features = encode_images(model, images, position_embedding(model, 16))
        expected = model.encode_image((images - mean) / std, normalize=True)
    torch.testing.assert_close(features.image_BE, expected, atol=1e-4, rtol=1e-3)


def test_resuming_equals_not_stopping(tmp_path: Path) -> None:
    whole = Pretraining(TINY)
    terms = [whole.step() for _ in range(4)]
    first = Pretraining(TINY)
    first.step()
    first.step()
    first.save(tmp_path)
    second = Pretraining(TINY)
    assert second.resume(tmp_path)
    assert second.steps_done == 2
    resumed = [second.step(), second.step()]
    for expected, actual in zip(terms[2:], resumed, strict=True):
        assert actual == pytest.approx(expected, rel=1e-4)
    expected_state, state = (run.trained_model().state_dict() for run in (whole, second))
    for name, tensor in expected_state.items():
        torch.testing.assert_close(state[name], tensor, atol=1e-5, rtol=1e-4)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    run = Pretraining(TINY)
    run.save(tmp_path)
    other = Pretraining(TINY.model_copy(update={"seed": 1}))
    with pytest.raises(SettingsError, match=r"checkpoint\.pt belongs to a run of other settings"):
        other.resume(tmp_path)


def test_the_length_is_steps_or_minutes() -> None:
    with pytest.raises(SettingsError, match="either steps or minutes"):
        TrainSettings()


@pytest.fixture(scope="module")
def held_out() -> tuple[HeldOut, Tensor]:
    """Pairs of held-out kinds as the shipped weights see them, and what these say of states."""
    backbone = load_builtin()
    tokenizer = backbone.tokenizer
    vocabulary = Vocabulary(tokenizer.encode, tokenizer.sot_token_id, tokenizer.eot_token_id)
    encoded = encode_held_out(backbone.model, pairs=32, seed=7)
    return encoded, state_features(backbone.model, vocabulary)


def test_the_shipped_weights_find_defects_of_kinds_they_never_saw(
    held_out: tuple[HeldOut, Tensor],
) -> None:
    figures = measure(*held_out, load_builtin().constants)
    assert figures.pixel_auroc_prompts > 0.85
    assert figures.pixel_auroc_reference > 0.85
    assert figures.participation_ratio > 15


def test_the_constants_are_calibrated_for_the_prior(held_out: tuple[HeldOut, Tensor]) -> None:
    encoded, states = held_out
    constants = fit_constants(encoded, states)
    distance = torch.stack([encoded.distances_PN[i] for i in constants.reference_layers]).mean(0)
    probability = constants.reference_probability(distance)[encoded.known]
    is_anomalous = encoded.labels_PN[encoded.known] == 1
    # Weighted as if a share of `PRIOR` were anomalous, predictions agree with labels on the whole.
    weight = torch.where(
        is_anomalous, PRIOR / is_anomalous.sum(), (1 - PRIOR) / (~is_anomalous).sum()
    )
    assert (weight * probability).sum().item() == pytest.approx(PRIOR, abs=0.06)


def test_the_command_exports_what_the_loader_reads(tmp_path: Path) -> None:
    main(["--steps", "2", "--batch-pairs", "2", "--held-out-pairs", "12", "--out", str(tmp_path)])
    backbone = load_builtin(tmp_path)
    trained = load_builtin().model.state_dict()["visual.proj"]
    assert not torch.equal(backbone.model.state_dict()["visual.proj"], trained)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["steps"] == 2
    assert 0 <= figures["pixel_auroc_prompts"] <= 1
