from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F

from apt_ray.features.attention import locality_mask
from apt_ray.features.builtin.apt_mini import build_model
from apt_ray.features.torchvision_guard import import_open_clip
from apt_ray.features.towers import FusedBlock, embed_patches, run_text_tower, run_vision_tower

if TYPE_CHECKING:
    from open_clip import CLIP


@pytest.fixture(scope="module", name="model")
def _model() -> CLIP:
    torch.manual_seed(0)
    return build_model().eval().requires_grad_(False)


def test_a_fused_block_equals_open_clips_own_with_and_without_a_mask(model: CLIP) -> None:
    block = model.visual.transformer.resblocks[0]
    x_BSD = torch.randn(2, 17, 192, generator=torch.Generator().manual_seed(1))
    mask_SS = locality_mask((4, 4), radius=1)
    for mask in (None, mask_SS):
        expected = block(x_BSD, attn_mask=mask)
        torch.testing.assert_close(FusedBlock(block)(x_BSD, attn_mask=mask), expected)
    assert not torch.allclose(block(x_BSD), block(x_BSD, attn_mask=mask_SS), atol=1e-4)


def test_a_fused_block_applies_the_layer_scale() -> None:
    torch.manual_seed(0)
    transformer = import_open_clip().transformer
    block = transformer.ResidualAttentionBlock(32, 4, ls_init_value=0.3).eval()
    x_BSD = torch.randn(2, 5, 32)
    torch.testing.assert_close(FusedBlock(block)(x_BSD), block(x_BSD))


def test_the_vision_tower_without_windows_equals_open_clips(model: CLIP) -> None:
    pixels = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    tokens_BSE, outputs = run_vision_tower(
        model.visual, pixels, model.visual.positional_embedding, mask_SS=None, local_blocks=0
    )
    torch.testing.assert_close(tokens_BSE[:, 0], model.visual(pixels), atol=1e-5, rtol=1e-4)
    assert len(outputs) == 6
    assert outputs[0].shape == (2, 257, 192)


def test_the_text_tower_ignores_what_stands_behind_the_end(model: CLIP) -> None:
    embedded = torch.randn(3, 10, 96, generator=torch.Generator().manual_seed(3))
    end_K = torch.tensor([9, 4, 6])
    features = run_text_tower(model, embedded, end_K)
    changed = embedded.clone()
    changed[1, 5:] = 0
    torch.testing.assert_close(run_text_tower(model, changed, end_K), features)
    short = run_text_tower(model, embedded[1:2, :5], end_K[1:2])
    torch.testing.assert_close(short, features[1:2], atol=1e-5, rtol=1e-4)


def test_the_value_value_path_adds_up_the_blocks_and_leaves_cls_as_it_is(model: CLIP) -> None:
    visual = model.visual
    pixels = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(4))
    ordinary_BSE, ordinary = run_vision_tower(visual, pixels, visual.positional_embedding)
    tokens_BSE, outputs = run_vision_tower(
        visual, pixels, visual.positional_embedding, value_value=True
    )
    torch.testing.assert_close(tokens_BSE[:, 0], ordinary_BSE[:, 0])
    torch.testing.assert_close(outputs, ordinary)

    x_BSD = embed_patches(visual, pixels, visual.positional_embedding)
    path_BSD = x_BSD
    for block, output_BSD in zip(visual.transformer.resblocks, outputs, strict=True):
        normed_BSD = block.ln_1(x_BSD)
        _, _, v = F.linear(normed_BSD, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(
            3, -1
        )
        v = v.unflatten(-1, (6, 32)).transpose(1, 2)
        mixed = ((v @ v.mT) * 32**-0.5).softmax(-1) @ v
        path_BSD = path_BSD + block.attn.out_proj(mixed.transpose(1, 2).flatten(2))
        x_BSD = output_BSD
    expected_BSE = visual.ln_post(path_BSD) @ visual.proj
    torch.testing.assert_close(tokens_BSE[:, 1:], expected_BSE[:, 1:], atol=1e-4, rtol=1e-4)
