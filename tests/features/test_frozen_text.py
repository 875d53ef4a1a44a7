from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from apt_ray.features.frozen_text import FrozenTextTower
from apt_ray.features.torchvision_guard import import_open_clip
from apt_ray.features.towers import run_text_tower

if TYPE_CHECKING:
    from open_clip import CLIP

END_K = torch.tensor([4, 0, 2, 4])
"""Where the texts end, counted from behind their [SOS]."""


def _model(*, layers: int = 3, quick: bool = False, scale: float | None = None) -> CLIP:
    torch.manual_seed(0)
    transformer = import_open_clip().transformer
    model: CLIP = transformer.TextTransformer(
        context_length=8,
        vocab_size=4,
        width=16,
        heads=2,
        layers=layers,
        act_layer=transformer.QuickGELU if quick else nn.GELU,
        ls_init_value=scale,
    )
    return model.eval().requires_grad_(False)


def _embedded(model: CLIP) -> tuple[torch.Tensor, torch.Tensor]:
    """[SOS] and what follows it."""
    g = torch.Generator().manual_seed(1)
    dtype = model.positional_embedding.dtype
    start_C = torch.randn(16, generator=g, dtype=dtype)
    return start_C, torch.randn(4, 5, 16, generator=g, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_it_puts_out_and_walks_back_what_the_plain_tower_does(
    layers: int, quick: bool, scale: float | None
) -> None:
    model = _model(layers=layers, quick=quick, scale=scale)
    start_C, embedded_KSC = _embedded(model)
    whole_KSC = torch.cat([start_C.expand(4, 1, -1), embedded_KSC], dim=1)
    plain_KC = run_text_tower(model, whole_KSC, END_K + 1)
    ours_KC = FrozenTextTower(model, start_C)(embedded_KSC, END_K)
    torch.testing.assert_close(ours_KC, plain_KC, atol=1e-5, rtol=1e-5)
    for at_KC in torch.randn(2, *plain_KC.shape, generator=torch.Generator().manual_seed(2)):
        ours, plain = (
            torch.autograd.grad(end_KC, embedded_KSC, at_KC, retain_graph=True)[0]
            for end_KC in (ours_KC, plain_KC)
        )
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quick", [False, True])
def test_the_gradient_is_that_of_finite_differences(quick: bool) -> None:
    model = _model(quick=quick, scale=0.3).double()
    start_C, embedded_KSC = _embedded(model)
    tower = FrozenTextTower(model, start_C)
    assert torch.autograd.gradcheck(lambda x_KSC: tower(x_KSC, END_K), embedded_KSC)


def test_what_stands_behind_the_end_does_not_matter() -> None:
    model = _model()
    start_C, embedded_KSC = _embedded(model)
    tower = FrozenTextTower(model, start_C)
    end_KC = tower(embedded_KSC, END_K)
    (at_KSC,) = torch.autograd.grad(end_KC.sum(), embedded_KSC)
    is_behind_KS = torch.arange(5) > END_K[:, None]
    assert (at_KSC[is_behind_KS] == 0).all()
    with torch.no_grad():
        changed_KSC = embedded_KSC.masked_fill(is_behind_KS[..., None], 7.0)
        torch.testing.assert_close(tower(changed_KSC, END_K), end_KC)


def test_it_copies_no_weights() -> None:
    model = _model().double()
    start_C, embedded_KSC = _embedded(model)
    tower = FrozenTextTower(model, start_C)
    before = tower(embedded_KSC, END_K)
    model.ln_final.bias.add_(1)
    torch.testing.assert_close(tower(embedded_KSC, END_K), before + 1)


def test_low_precision_attends_in_float32() -> None:
    model = _model()
    start_C, embedded_KSC = _embedded(model)
    exact_KC = FrozenTextTower(model, start_C)(embedded_KSC, END_K)
    low_KC = FrozenTextTower(model.bfloat16(), start_C.bfloat16())(embedded_KSC.bfloat16(), END_K)
    assert low_KC.dtype == torch.bfloat16
    torch.testing.assert_close(low_KC.float(), exact_KC, atol=0.1, rtol=0)
    (at_KSC,) = torch.autograd.grad(low_KC.float().sum(), embedded_KSC)
    assert at_KSC.isfinite().all()
