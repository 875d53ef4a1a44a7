"""Each baseline against the facts known of its official code."""

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.decomposition import PCA

from apt_ray.config import BackboneSpec, FitSettings
from apt_ray.data.folders import Category
from apt_ray.detection.rule import (
    TOP_SHARE,
    anomalous_log_odds,
    anomalous_probability,
    anomaly_maps,
    top_mean,
)
from apt_ray.features.clip import FrozenCLIP, load_backbone
from apt_ray.features.protocol import ImageFeatures
from apt_ray.prompts.fit import fit
from apt_ray.prompts.guidance import meta_features
from benchmarks.baselines import (
    METHODS,
    autoencoder,
    memory,
    patchcore,
    promptad,
    prompts,
    subspace,
    winclip,
)
from benchmarks.baselines.descriptors import as_maps, descriptors
from benchmarks.baselines.linear import labelled_patches
from benchmarks.baselines.support import Encoded, Method, Support
from benchmarks.baselines.views import ANGLES, SCALES, encode_windows, turned, windows


@pytest.fixture(scope="module")
def support(backbone: FrozenCLIP, category: Category) -> Support:
    """Two shots; prompts are trained for a moment only."""
    support = Support(backbone, category.name, category.support_set(2, seed=0), seed=0)
    support.settings = FitSettings(steps=2)
    return support


@pytest.fixture(scope="module")
def encoded(backbone: FrozenCLIP, support: Support) -> Encoded:
    """The support images themselves, with their windows."""
    return Encoded(features=support.features, windows=support.windows)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.rows[0])
def test_all_methods_score_images_by_the_same_rule(
    method: Method, support: Support, encoded: Encoded
) -> None:
    rules, seconds = support.fit(method)
    assert set(rules) == set(method.rows)
    assert seconds > 0
    assert [name for name, rule in rules.items() if rule.threshold is not None] == [
        name for name in method.rows if name in ("apt", "coop", "random-text")
    ]
    fused = {"apt", "coop", "random-text", "free", "linear", "handwritten", "reference"}
    for name, rule in rules.items():
        maps_BHW, scores_B = rule.score(encoded)
        size = support.backbone.prompt_size
        assert maps_BHW.shape == (2, size, size)
        assert maps_BHW.min() >= 0
        assert maps_BHW.max() <= 1
        if name == "patchcore":
            assert ((scores_B > 0) & (scores_B < 1)).all()
            continue
        power = 2 if name in fused else 1  # what is fused is a mean of squares
        top_B = top_mean(maps_BHW.flatten(1) ** power, round(TOP_SHARE * size**2))
        assert torch.allclose(scores_B**power, top_B, atol=1e-6)


def test_words_are_fused_with_the_memory_as_a_prompt_set_fuses_them(
    support: Support, encoded: Encoded
) -> None:
    ours = prompts.fit_apt(support)
    prompt_set = fit(
        support.category,
        support.paths,
        support.settings,
        backbone=support.backbone,
        bank=support.bank,
    )
    constants = support.backbone.constants
    by_hand = support.with_memory(
        "apt",
        lambda encoded: anomalous_log_odds(
            encoded.features.tokens_BNE, prompt_set.text_features, constants
        ),
    )
    assert set(by_hand) == set(ours)
    for name, rule in ours.items():
        for mine, expected in zip(by_hand[name].score(encoded), rule.score(encoded), strict=True):
            assert torch.allclose(mine, expected, atol=1e-5)


def test_descriptors_are_the_directions_on_the_finest_grid() -> None:
    g = torch.Generator().manual_seed(0)
    fine_BMD = F.normalize(torch.randn(2, 16, 3, generator=g), dim=-1)
    raw_BMD = 9 * torch.rand(2, 4, 5, generator=g) + 1
    features = ImageFeatures(
        tokens_BNE=fine_BMD,
        cls_BE=fine_BMD[:, 0],
        layers={0: fine_BMD, 1: F.normalize(raw_BMD, dim=-1), 2: raw_BMD},
    )
    described_BFD = descriptors(features)
    assert described_BFD.shape == (2, 16, 8)
    assert torch.allclose(described_BFD.norm(dim=-1), torch.ones(2, 16))
    assert torch.allclose(F.normalize(described_BFD[..., :3], dim=-1), fine_BMD, atol=1e-6)
    # A corner of the finer grid lies beyond the centre of the coarse place there.
    corner_BD = F.normalize(raw_BMD, dim=-1)[:, 0]
    assert torch.allclose(F.normalize(described_BFD[:, 0, 3:], dim=-1), corner_BD, atol=1e-6)


def test_no_method_is_fitted_for_free(backbone: FrozenCLIP, category: Category) -> None:
    """What an earlier method encoded is charged to the later one that uses it too."""
    support = Support(backbone, category.name, category.support_set(1, seed=0), seed=0)
    (dino,) = (method for method in METHODS if method.rows[0] == "anomalydino")
    _, alone = support.fit(dino)
    _, again = support.fit(dino)
    _, memory_seconds = support.fit(Method(rows=("memory",), about="", fit=memory.fit_memory))
    assert again == pytest.approx(alone, rel=0.5)
    assert memory_seconds < alone


def test_anomalydino_turns_support_images_by_eight_angles() -> None:
    assert ANGLES == (0, 45, 90, 135, 180, 225, 270, 315)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8))
    pictures = turned([image])
    assert len(pictures) == 8
    assert np.array_equal(pictures[0], image)
    assert np.array_equal(pictures[2], image.transpose(Image.Transpose.ROTATE_90))
    assert np.array_equal(pictures[4], image.transpose(Image.Transpose.ROTATE_180))


def test_with_rotations_a_turned_part_is_nothing_new(
    backbone: FrozenCLIP, support: Support
) -> None:
    pixels = backbone.preprocess([support.images[0].transpose(Image.Transpose.ROTATE_90)])
    part = Encoded(features=backbone.encode_images(pixels))
    (plain,) = memory.fit_memory(support).values()
    (rotated,) = memory.fit_anomalydino(support).values()
    # Square images turn without interpolation, so all that is left is rounding.
    assert rotated.score(part)[1].item() == pytest.approx(0, abs=1e-3)
    assert plain.score(part)[1].item() > 2e-3


def test_winclip_windows_hold_neighbouring_patches() -> None:
    rows, columns = 4, 5
    expected = [
        [(row + dy) * columns + column + dx for dy, dx in product(range(2), repeat=2)]
        for row, column in product(range(rows - 1), range(columns - 1))
    ]
    assert windows((rows, columns), 2).tolist() == expected
    assert SCALES == (2, 3)


def test_a_window_sees_itself_alone_and_the_whole_grid_is_the_whole_image() -> None:
    backbone = load_backbone(BackboneSpec(attention="ordinary"))
    pixels = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    whole_B1E = encode_windows(backbone, pixels, backbone.grid[0])
    assert torch.allclose(whole_B1E[:, 0], backbone.encode_images(pixels).cls_BE, atol=1e-5)
    before = encode_windows(backbone, pixels[:1], 2)
    pixels[0, :, 16:] = 0  # leaves the first two rows of patches as they are
    after = encode_windows(backbone, pixels[:1], 2)
    assert torch.allclose(before[:, :15], after[:, :15], atol=1e-5)
    assert not torch.allclose(before[:, 15:], after[:, 15:], atol=1e-3)


def test_winclip_spreads_windows_by_the_harmonic_mean() -> None:
    grid, scale = (3, 4), 2
    values_W = torch.rand(6, generator=torch.Generator().manual_seed(0)) + 0.1
    index_WK = windows(grid, scale)
    expected = [
        1 / np.mean([1 / v.item() for v, k in zip(values_W, index_WK, strict=True) if n in k])
        for n in range(12)
    ]
    spread_N = winclip.spread(values_W[None], grid, scale)[0]
    assert spread_N.tolist() == pytest.approx(expected, rel=1e-5)


def test_winclip_temperature_and_distance() -> None:
    text_PE = torch.eye(2)
    image_1E = torch.tensor([[0.6, 0.8]])
    expected = 1 / (1 + math.exp((0.6 - 0.8) / 0.07))
    assert winclip.class_probability(image_1E, text_PE).item() == pytest.approx(expected)
    reference_ME = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert winclip.half_distance(image_1E[None], reference_ME).item() == pytest.approx(0.1)


def test_winclip_few_shot_is_the_mean_of_the_words_and_the_distance(
    support: Support, encoded: Encoded
) -> None:
    """Of the support images themselves the distance is nothing."""
    rules = winclip.fit(support)
    words, both = (rules[name].score(encoded)[0] for name in ("winclip-zero", "winclip"))
    assert torch.allclose(both, words / 2, atol=1e-4)


def test_promptad_learns_four_vectors_and_writes_states_behind_them(
    backbone: FrozenCLIP,
) -> None:
    learner = promptad.Prompts(backbone, "washer", seed=0)
    assert [tuple(c.shape) for c in learner.contexts] == [
        (4, backbone.token_width),
        (4, 1, backbone.token_width),
    ]
    normal_1E, written_TE, learned_TE = learner.encode()
    assert (len(normal_1E), len(written_TE), len(learned_TE)) == (1, 8, 4)
    # A context that repeats written words gives the text that they make.
    with torch.no_grad():
        learner.contexts[0].copy_(backbone.embed_words("a b c d"))
    assert torch.allclose(
        learner.encode()[1][0], backbone.encode_texts(["a b c d damaged washer."])[0], atol=1e-5
    )


def test_promptad_loss_has_its_three_parts() -> None:
    normal_1E, written_TE, learned_TE = torch.eye(3)[:1], torch.eye(3)[1:2], torch.eye(3)[2:]
    token_NE = F.normalize(torch.tensor([[0.0, 1.0, 1.0]]), dim=-1)
    scale = 2.0
    contrast = math.log(1 + 2 * math.exp(scale * token_NE[0, 1].item()))
    margin = 2.0  # squared distances: 2 to the normal prompt, 0 to the mean anomalous one
    alignment = 0.001 * 2
    loss = promptad.loss(token_NE, normal_1E, written_TE, learned_TE, scale=scale)
    assert loss.item() == pytest.approx(contrast + margin + alignment, rel=1e-5)


def test_promptad_learning_lowers_its_loss_and_fuses_in_parallel(support: Support) -> None:
    scale = math.log(support.backbone.constants.dense_scale)
    tokens_NE = support.features.tokens_BNE.flatten(0, 1)

    def margin(text_PE: torch.Tensor) -> float:
        return (tokens_NE @ (text_PE[1] - text_PE[0])).mean().item()

    with torch.no_grad():
        start, *rest = promptad.Prompts(support.backbone, support.category, 0).encode()
    before = torch.cat([start, promptad.mean_direction(torch.cat(rest))])
    assert margin(promptad.learn(support, scale)) < margin(before)
    text, visual = torch.tensor([0.5]), torch.tensor([0.25])
    assert promptad.parallel(text, visual).item() == pytest.approx(1 / 6)


def test_the_subspace_is_that_of_scikit_learn(support: Support) -> None:
    tokens_ND = descriptors(support.features).flatten(0, 1)
    ours = subspace.Subspace.of(tokens_ND)
    theirs = PCA(n_components=subspace.EXPLAINED, svd_solver="full").fit(tokens_ND.double().numpy())
    assert len(ours.components_CD) == theirs.n_components_
    query = torch.randn(5, tokens_ND.shape[1], generator=torch.Generator().manual_seed(0))
    restored = theirs.inverse_transform(theirs.transform(query.double().numpy()))
    expected = ((query.numpy() - restored) ** 2).sum(-1)
    assert ours.residual(query).numpy() == pytest.approx(expected, rel=1e-3)


def test_patchcore_averages_places_and_weighs_the_worst_by_its_neighbours(
    support: Support,
) -> None:
    spike_1MD = torch.zeros(1, 25, 1)
    spike_1MD[0, 12] = 9
    features = ImageFeatures(tokens_BNE=spike_1MD, cls_BE=spike_1MD[:, 0], layers={0: spike_1MD})
    embedded_1F1 = patchcore.embed(features, {0: torch.tensor(1.0)})
    near_55 = torch.zeros(5, 5)
    near_55[1:4, 1:4] = 1
    assert torch.allclose(embedded_1F1[0, :, 0].unflatten(0, (5, 5)), near_55)

    known_KD = torch.arange(20.0)[:, None]
    nearest_F, score = patchcore.distances(torch.tensor([[3.5], [-2.0], [7.0]]), known_KD)
    assert nearest_F.tolist() == pytest.approx([0.5, 2.0, 0.0], abs=1e-5)
    # The worst is nearest to 0, whose nine neighbours are 0 to 8, 2 to 10 away from it.
    share = math.exp(2) / sum(math.exp(distance) for distance in range(2, 11))
    assert score.item() == pytest.approx((1 - share) * 2, rel=1e-5)

    (rule,) = patchcore.fit(support).values()
    known = Encoded(features=support.features)
    noise = torch.rand(1, 3, 320, 320, generator=torch.Generator().manual_seed(0))
    other = Encoded(features=support.backbone.encode_images(noise))
    assert rule.score(other)[1].item() > 2 * rule.score(known)[1].max().item()


def test_the_linear_head_learns_from_clear_labels_only(support: Support) -> None:
    tokens_XE, label_X = labelled_patches(support)
    bank = support.bank
    known = int((bank.noisy_labels_SDN >= 0).sum()) + bank.clean_SVNE[..., 0].numel()
    assert len(tokens_XE) == len(label_X) == known
    assert set(label_X.tolist()) == {0, 1}


@pytest.mark.slow
def test_the_autoencoder_restores_what_was_distorted(support: Support) -> None:
    clean = as_maps(descriptors(support.turned))
    network = autoencoder.train(clean, seed=0)
    distorted, mask_B1HW = autoencoder.distort(clean, torch.Generator().manual_seed(1))
    assert torch.equal(distorted * (1 - mask_B1HW), clean * (1 - mask_B1HW))
    with torch.no_grad():
        change_BHW = 1 - F.cosine_similarity(network(distorted), distorted, dim=1)
    inside = mask_B1HW[:, 0] == 1
    assert change_BHW[inside].mean() > 2 * change_BHW[~inside].mean()


def test_a_random_text_encoder_changes_the_words_and_not_the_images(
    backbone: FrozenCLIP, support: Support
) -> None:
    other = prompts.with_random_text(backbone, seed=0)
    pixels = backbone.preprocess(support.images)
    assert torch.equal(other.encode_images(pixels).tokens_BNE, support.features.tokens_BNE)
    ours_TE, theirs_TE = (b.encode_texts(["a flawless part"]) for b in (backbone, other))
    assert abs((ours_TE @ theirs_TE.T).item()) < 0.7
    assert other.fingerprint != backbone.fingerprint


def test_written_prompts_alone_are_the_meta_prompt(support: Support, encoded: Encoded) -> None:
    backbone = support.backbone
    rule = prompts.fit_handwritten(support)["handwritten-alone"]
    p_BN = anomalous_probability(
        encoded.features.tokens_BNE, meta_features(backbone), backbone.constants
    )
    expected = anomaly_maps(p_BN, backbone.grid, backbone.prompt_size)
    assert torch.allclose(rule.score(encoded)[0], expected)
