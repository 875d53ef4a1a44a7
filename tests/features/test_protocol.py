"""The method on an encoder whose features are known: whoever keeps to the protocol will do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from apt_ray.anomalies.bank import encode_support
from apt_ray.config import FitSettings
from apt_ray.detection.detector import Detector
from apt_ray.detection.reference import ReferenceMemory
from apt_ray.features.clip import FrozenCLIP
from apt_ray.features.protocol import Backbone
from apt_ray.prompts.fit import fit
from tests.fakes import FakeBackbone, bank_spec


def plain(colour: tuple[int, int, int], size: int = 16) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def test_the_fake_and_the_real_backbone_keep_to_the_protocol(backbone: FrozenCLIP) -> None:
    backbones: list[Backbone] = [FakeBackbone(), backbone]  # the type checker reads this, too
    for one in backbones:
        pixels = one.preprocess([plain((10, 20, 30), 40)] * 2)
        assert pixels.shape == (2, 3, one.input_size, one.input_size)
        features = one.encode_images(pixels)
        patches = one.grid[0] * one.grid[1]
        assert features.tokens_BNE.shape[:2] == (2, patches)
        places = one.reference_grid[0] * one.reference_grid[1]
        assert features.layers[0].shape[:2] == (2, places)
        for tokens in (features.tokens_BNE, features.cls_BE, features.layers[0]):
            assert torch.allclose(tokens.norm(dim=-1), torch.ones(tokens.shape[:-1]), atol=1e-5)
        widths = [tokens.shape[-1] for tokens in features.layers.values()]
        assert features.whole_BW.shape == (2, sum(widths))
        lengths_2 = torch.full((2,), len(widths) ** 0.5)
        assert torch.allclose(features.whole_BW.norm(dim=-1), lengths_2)
        contexts = torch.randn(3, 2, one.token_width, generator=torch.Generator().manual_seed(0))
        text_TE = one.encode_contexts(contexts, torch.tensor([2, 1, 2]))
        assert text_TE.shape == (3, features.tokens_BNE.shape[-1])
        contexts[1, 1] = 100.0  # behind the end of its text
        assert torch.allclose(one.encode_contexts(contexts, torch.tensor([2, 1, 2])), text_TE)
        assert one.encode_texts(["a normal part"]).shape == text_TE[:1].shape
        assert one.embed_words("a normal part").shape[1] == one.token_width


def test_a_memory_knows_how_far_a_colour_is() -> None:
    backbone = FakeBackbone()
    support = backbone.encode_images(backbone.preprocess([plain((255, 0, 0))]))
    memory = ReferenceMemory.of(support)
    same, other = plain((255, 0, 0)), plain((0, 0, 255))
    seen = backbone.encode_images(backbone.preprocess([same, other]))
    (distance_BN,) = memory.distances(seen).values()
    # (1, 0, 0, 1) and (0, 0, 1, 1) of unit length: the cosine is one half.
    expected = torch.tensor([[0.0], [0.5]]).expand(2, 16)
    assert torch.allclose(distance_BN, expected, atol=1e-3)


def test_a_bank_is_what_the_encoder_sees_of_perturbed_images() -> None:
    encoder = FakeBackbone()
    gray = [plain((128, 128, 128))] * 2
    bank = encode_support(encoder, gray, bank_spec(encoder, 2, strengths=(0.3,)))
    assert bank.shots == 2
    assert bank.clean_SVNE.shape[2:] == (16, 4)
    clean_E = bank.clean_SVNE[0, 0, 0].float()
    noisy = bank.noisy_SDNE[0.3].float()
    moved = (noisy - clean_E).norm(dim=-1)
    assert moved[bank.noisy_labels_SDN == 1].mean() > moved[bank.noisy_labels_SDN == 0].mean()
    assert torch.allclose(moved[bank.noisy_labels_SDN == 0], torch.zeros(()), atol=2e-3), (
        "untouched patches look as before"
    )


def test_a_fit_finds_what_its_encoder_shows(tmp_path: Path) -> None:
    backbone = FakeBackbone()
    rng = np.random.default_rng(0)
    files = []
    for number in range(3):
        pixels = np.clip(rng.normal((200, 60, 60), 4, (16, 16, 3)), 0, 255).astype(np.uint8)
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(files[-1])
    prompt_set = fit("plate", files, FitSettings(steps=5), backbone=backbone)
    detector = Detector(backbone, prompt_set)
    stained = np.array(Image.open(files[0]))
    stained[4:8, 8:12] = (40, 60, 200)
    good, bad = detector.inspect([Image.open(files[0]), Image.fromarray(stained)])
    assert bad.anomaly_score > good.anomaly_score
    row, column = np.unravel_index(bad.anomaly_map.argmax(), bad.anomaly_map.shape)
    assert (row // 4, column // 4) == (1, 2)
    assert detector.prompt_set.fingerprint == "fake"
    with pytest.raises(AttributeError):
        _ = backbone.model  # nothing above the encoders asked for torch weights
