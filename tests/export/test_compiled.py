"""Encoders that OpenVINO compiles: the built-in ones, and none that it computes otherwise."""

import pytest
import torch

from apt_ray.errors import ExportError
from apt_ray.export.compiled import compile_encoders
from apt_ray.features.clip import FrozenCLIP, load_backbone
from apt_ray.features.protocol import ImageFeatures


def test_compiled_encoders_give_the_same_features_of_any_number_of_images(
    backbone: FrozenCLIP,
) -> None:
    compiled = load_backbone()
    compile_encoders(compiled, threads=1)
    size = backbone.input_size
    pixels_B3HW = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    all_at_once = compiled.encode_images(pixels_B3HW)
    first = compiled.encode_images(pixels_B3HW[:1])
    expected = backbone.encode_images(pixels_B3HW)
    assert torch.equal(all_at_once.tokens_BNE, compiled.encode_images(pixels_B3HW).tokens_BNE)
    for found, wanted in ((all_at_once, expected), (first, expected[:1])):
        assert torch.allclose(found.tokens_BNE, wanted.tokens_BNE, atol=1e-5)
        assert torch.allclose(found.cls_BE, wanted.cls_BE, atol=1e-5)
        assert found.layers.keys() == wanted.layers.keys()
        for layer, tokens in wanted.layers.items():
            assert torch.allclose(found.layers[layer], tokens, atol=1e-3)
    assert compiled.fingerprint == backbone.fingerprint


def test_features_that_differ_are_refused() -> None:
    backbone = load_backbone()
    honest = FrozenCLIP.encode_images

    class Drifting(FrozenCLIP):
        def encode_images(self, pixels_B3HW: torch.Tensor) -> ImageFeatures:
            if torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
                pixels_B3HW = pixels_B3HW.flip(1)
            return honest(self, pixels_B3HW)

    backbone.__class__ = Drifting
    with pytest.raises(ExportError, match=r"features of builtin that differ by .*runtime: torch"):
        compile_encoders(backbone, threads=1)
