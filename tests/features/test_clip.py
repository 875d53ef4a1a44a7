from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from apt_ray.config import BackboneSpec
from apt_ray.errors import BackboneError
from apt_ray.features.builtin.apt_mini import build_tokenizer, load_builtin
from apt_ray.features.clip import FrozenCLIP, load_backbone, resize_position_embedding
from apt_ray.features.torchvision_guard import import_open_clip


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a real architecture, as a local file."""
    torch.manual_seed(0)
    model = import_open_clip().create_model("ViT-B-32")
    path = tmp_path_factory.mktemp("weights") / "random.pt"
    torch.save(model.state_dict(), path)
    return path


def test_ordinary_patch_tokens_and_cls_equal_those_of_open_clip(pixels: torch.Tensor) -> None:
    model = load_builtin().model
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (model.visual.image_mean, model.visual.image_std)
    )
    with torch.no_grad():
        theirs = model.visual.forward_intermediates(
            (pixels - mean) / std,
            indices=[2, 5],
            normalize_intermediates=True,
            output_fmt="NLC",
        )
        patches_BNE = F.normalize(theirs["image_intermediates"][-1] @ model.visual.proj, dim=-1)
        cls_BE = F.normalize(theirs["image_features"], dim=-1)
        raw = model.visual.forward_intermediates(
            (pixels - mean) / std, indices=[2], output_fmt="NLC"
        )["image_intermediates"][0]
    ours = load_backbone(
        BackboneSpec(attention="ordinary", reference_encoder="backbone", reference_layers=(2,))
    ).encode_images(pixels)
    assert torch.allclose(ours.tokens_BNE, patches_BNE, atol=1e-5)
    assert torch.allclose(ours.cls_BE, cls_BE, atol=1e-5)
    assert torch.allclose(ours.layers[2], F.normalize(raw, dim=-1), atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_window_over_the_whole_grid_is_ordinary_attention(
    pixels: torch.Tensor, blocks: int
) -> None:
    wide = load_backbone(BackboneSpec(locality_radius=16, locality_blocks=blocks))
    ordinary = load_backbone(BackboneSpec(attention="ordinary"))
    assert torch.allclose(
        wide.encode_images(pixels).tokens_BNE, ordinary.encode_images(pixels).tokens_BNE, atol=1e-5
    )


def test_a_small_window_changes_patches_but_not_the_cls_token(pixels: torch.Tensor) -> None:
    narrow = load_backbone(BackboneSpec(locality_radius=1, locality_blocks=2)).encode_images(pixels)
    ordinary = load_backbone(BackboneSpec(attention="ordinary")).encode_images(pixels)
    assert torch.allclose(narrow.cls_BE, ordinary.cls_BE, atol=1e-5)
    assert not torch.allclose(narrow.tokens_BNE, ordinary.tokens_BNE, atol=1e-3)


def test_position_embeddings_are_interpolated_as_open_clip_does() -> None:
    open_clip = import_open_clip()
    native = load_builtin().model
    larger = open_clip.create_model("ViT-B-32", force_image_size=256)
    larger.visual.grid_size = (20, 20)
    state = {"visual.positional_embedding": native.visual.positional_embedding.detach().clone()}
    open_clip.model.resize_pos_embed(state, larger)
    ours = resize_position_embedding(native.visual.positional_embedding, (20, 20))
    assert torch.equal(ours, state["visual.positional_embedding"])


def test_a_larger_input_gives_more_patches() -> None:
    backbone = load_backbone(BackboneSpec(input_size=160, reference_encoder="backbone"))
    pixels = backbone.preprocess([Image.new("RGB", (300, 100), "gray")])
    assert pixels.shape == (1, 3, 160, 160)
    assert backbone.encode_images(pixels).tokens_BNE.shape[1] == 20 * 20


@pytest.mark.parametrize("text", ["a flawless surface", "crack", "a photo of a part with a hole"])
def test_the_truncated_text_encoder_equals_the_full_one(backbone: FrozenCLIP, text: str) -> None:
    model = load_builtin().model
    tokens = build_tokenizer()([text])
    end = int(tokens[0].argmax())
    context_1LC = model.token_embedding(tokens)[:, 1:end]
    full = F.normalize(model.encode_text(tokens), dim=-1)
    assert torch.allclose(backbone.encode_texts([text, "a longer text"])[:1], full, atol=1e-5)
    assert torch.allclose(
        backbone.encode_contexts(context_1LC, torch.tensor([end - 1])), full, atol=1e-5
    )
    garbage = torch.randn(1, 3, context_1LC.shape[-1])
    padded = torch.cat([context_1LC, garbage], dim=1)
    assert torch.allclose(
        backbone.encode_contexts(padded, torch.tensor([end - 1])), full, atol=1e-5
    )


def test_preprocessing_keeps_the_whole_image(backbone: FrozenCLIP) -> None:
    image = Image.new("RGB", (400, 100), "black")
    image.paste("white", (0, 0, 20, 100))  # what a centre crop would cut off
    pixels = backbone.preprocess([image])
    assert pixels[0, :, :, 0].min() > 0.9
    assert pixels[0, :, :, 64].max() < 0.1


def test_bfloat16_says_nearly_the_same(backbone: FrozenCLIP, pixels: torch.Tensor) -> None:
    low = load_backbone(BackboneSpec(precision="bfloat16"))
    ours, exact = low.encode_images(pixels), backbone.encode_images(pixels)
    assert ours.tokens_BNE.dtype == torch.float32
    assert not torch.equal(ours.tokens_BNE, exact.tokens_BNE)
    assert (ours.tokens_BNE * exact.tokens_BNE).sum(-1).min() > 0.995
    for layer, tokens_BND in ours.layers.items():
        assert (tokens_BND * exact.layers[layer]).sum(-1).min() > 0.995
    contexts_1LC = backbone.embed_words("a flawless surface")[None].requires_grad_(True)
    lengths = torch.tensor([contexts_1LC.shape[1]])
    features_1E = low.encode_contexts(contexts_1LC, lengths)
    assert (features_1E * backbone.encode_contexts(contexts_1LC, lengths)).sum() > 0.99
    (gradient,) = torch.autograd.grad(features_1E[0, 0], contexts_1LC)
    assert gradient.dtype == torch.float32
    assert gradient.abs().max() > 0


def test_the_fingerprint_covers_weights_attention_and_input_size(backbone: FrozenCLIP) -> None:
    others = [
        BackboneSpec(attention="ordinary"),
        BackboneSpec(locality_radius=2),
        BackboneSpec(input_size=160),
        BackboneSpec(reference_layers=(1,)),
        BackboneSpec(precision="bfloat16"),
    ]
    fingerprints = [load_backbone(spec).fingerprint for spec in others]
    assert len({backbone.fingerprint, *fingerprints}) == 6
    assert load_backbone().fingerprint == backbone.fingerprint


def test_a_checkpoint_file_loads_and_its_activation_is_part_of_the_fingerprint(
    checkpoint: Path,
) -> None:
    spec = BackboneSpec(name="ViT-B-32", pretrained=str(checkpoint), quick_gelu=False)
    gelu = load_backbone(spec)
    assert gelu.input_size == 224
    pixels = gelu.preprocess([Image.effect_noise((300, 200), 50).convert("RGB")])
    assert gelu.encode_images(pixels).tokens_BNE.shape == (1, 49, 512)
    quick = load_backbone(spec.model_copy(update={"quick_gelu": True}))
    assert quick.fingerprint != gelu.fingerprint


def test_a_checkpoint_file_must_say_its_activation(checkpoint: Path) -> None:
    with pytest.raises(BackboneError, match="quick_gelu"):
        load_backbone(BackboneSpec(name="ViT-B-32", pretrained=str(checkpoint)))


def test_a_checkpoint_of_another_architecture_is_refused(checkpoint: Path) -> None:
    with pytest.raises(BackboneError, match="belongs to this architecture"):
        load_backbone(BackboneSpec(name="ViT-B-16", pretrained=str(checkpoint), quick_gelu=False))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("ViT-B-16-SigLIP", "text tower"),
        ("RN50", "not a ViT"),
        ("convnext_base", "not a ViT"),
        ("roberta-ViT-B-32", "text tower"),
        ("coca_ViT-B-32", "text tower|CLS|causal"),
        ("no-such-model", "no architecture"),
    ],
)
def test_other_architectures_are_refused_by_name(name: str, why: str) -> None:
    with pytest.raises(BackboneError, match=why) as caught:
        load_backbone(BackboneSpec(name=name, pretrained="openai"))
    assert name in str(caught.value)


def test_missing_or_unknown_weights_are_refused() -> None:
    with pytest.raises(BackboneError, match="name a pretrained tag"):
        load_backbone(BackboneSpec(name="ViT-B-16"))
    with pytest.raises(BackboneError, match="neither a file nor a pretrained tag"):
        load_backbone(BackboneSpec(name="ViT-B-16", pretrained="/no/such/file.pt"))


@pytest.mark.parametrize(
    "spec",
    [
        BackboneSpec(input_size=130),
        BackboneSpec(input_size=64),
        BackboneSpec(reference_encoder="backbone", reference_layers=(6,)),
        BackboneSpec(reference_layers=(7,)),
        BackboneSpec(locality_blocks=7),
    ],
)
def test_sizes_and_blocks_that_the_model_lacks_are_refused(spec: BackboneSpec) -> None:
    with pytest.raises(BackboneError, match="choose"):
        load_backbone(spec)


def test_tiles_are_seen_one_at_a_time_and_joined_row_by_row() -> None:
    backbone = load_backbone(BackboneSpec(reference_encoder="backbone"))
    tiled = load_backbone(BackboneSpec(reference_encoder="backbone", tiles=2))
    assert tiled.input_size == 2 * backbone.input_size
    assert tiled.grid == (32, 32)
    g = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 256, 256, generator=g)
    features = tiled.encode_in_batches(pixels)
    lower_left = backbone.encode_images(pixels[:, :, 128:, :128])
    for whole, part in (
        (features.tokens_BNE, lower_left.tokens_BNE),
        *zip(features.layers.values(), lower_left.layers.values(), strict=True),
    ):
        square = whole.unflatten(1, (32, 32))[:, 16:, :16].flatten(1, 2)
        torch.testing.assert_close(square, part, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(features.cls_BE.norm(dim=1), torch.ones(2))
    assert tiled.fingerprint != backbone.fingerprint
