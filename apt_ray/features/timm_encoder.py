"""Any model of timm as reference encoder: a ViT read by its blocks, a CNN by its stages.

Nothing behind the last layer that is read is kept or computed. The defaults are those of the
published methods: the last block of a ViT, normalised as the model itself would (AnomalyDINO, arXiv
2405.14529), the stages of a CNN at an eighth and a sixteenth of the size (PatchCore, arXiv
2106.08265).

B images, N places of the grid, D channels of the layers that are read.
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from apt_ray.errors import BackboneError
from apt_ray.features.descriptors import describe
from apt_ray.features.fingerprint import fingerprint
from apt_ray.features.torchvision_guard import import_timm

_REDUCTIONS = (8, 16)  # of the layers that are read by default
_SIZE_OF_BLOCKS, _SIZE_OF_STAGES = 448, 320  # pixels a side by default, or near them
_POOL = 1


class TimmEncoder:
    """A model of timm up to the last layer that is read; none of its weights ever change.

    Args:
        name: as timm has it, `NAME` or `NAME.TAG` with a pretrained tag.
        weights: a checkpoint file of the model; None downloads those of the tag, once.
        layers: blocks or stages, counted from 0, in ascending order; None is those of the published
            methods.
        input_size: pixels a side; None is one that the model takes: 448 or near it for blocks, 320
            for stages, its own where that is fixed.
        pool: side, odd, of the window over which features are averaged; None is 1.
        lengths: whether the last stage of a CNN follows once more as it is, as of `describe`;
            blocks end in a normalisation, so that the lengths of what they give say nothing.
        device: of torch.
        precision: of the arithmetic.

    Attributes:
        input_size: pixels a side.
        grid: (rows, columns) of places, those of the finest layer.
        fingerprint: hex digest over the weights and everything else that shapes the features.

    Raises:
        BackboneError: There is no such model, its weights cannot be had, or a setting does not
            suit it.
    """

    def __init__(
        self,
        name: str,
        *,
        weights: Path | None = None,
        layers: tuple[int, ...] | None = None,
        input_size: int | None = None,
        pool: int | None = None,
        lengths: bool = True,
        device: str = "cpu",
        precision: torch.dtype = torch.float32,
    ) -> None:
        model = _load(name, weights)
        if not hasattr(model, "forward_intermediates"):
            raise BackboneError(
                f"timm:{name} does not give the features of its layers: update timm, or choose"
                f" another model"
            )
        published = model.pretrained_cfg
        reductions = [int(layer["reduction"]) for layer in model.feature_info]
        has_blocks = len(set(reductions)) == 1
        layers = _layers(name, reductions, layers)
        self.input_size = _size(name, model, reductions, input_size)
        self._pool = pool or _POOL
        self._has_blocks = has_blocks
        self._lengths = lengths and not has_blocks
        self._layers = model.prune_intermediate_layers(list(layers), prune_norm=not has_blocks)
        self._device, self._dtype = torch.device(device), precision
        description = {
            "model": f"{published['architecture']}.{published.get('tag', '')}",
            "mean": list(published["mean"]),
            "std": list(published["std"]),
            "layers": layers,
            "input_size": self.input_size,
            "pool": self._pool,
            "precision": str(precision),
            **({} if lengths else {"lengths": False}),
        }
        # Before position embeddings are resized, whose last bits may differ between machines.
        self.fingerprint = fingerprint(description, model)
        self._mean_3 = torch.tensor(published["mean"], device=self._device)
        self._std_3 = torch.tensor(published["std"], device=self._device)
        self._model = model
        try:
            if hasattr(model, "set_input_size"):
                model.set_input_size(img_size=(self.input_size, self.input_size))
            model.to(self._device, precision, memory_format=torch.channels_last)
            black = torch.zeros(1, 3, self.input_size, self.input_size)
            rows, columns = max(x_BDHW.shape[-2:] for x_BDHW in self._read(black))
        except Exception as error:  # each model has its own ways
            raise BackboneError(
                f"timm:{name} cannot read images of {self.input_size} pixels a side"
                f" ({error!r}): choose another reference_input_size, such as its own"
                f" ({published['input_size'][-1]}), or another model"
            ) from error
        self.grid = (rows, columns)

    def encode(self, pixels_B3HW: torch.Tensor) -> dict[int, torch.Tensor]:
        """Pixels in 0..1 of `input_size` -> reference layers as of `describe`."""
        return describe(self._read(pixels_B3HW), pool=self._pool, lengths=self._lengths)

    @torch.no_grad()
    def _read(self, pixels_B3HW: torch.Tensor) -> list[torch.Tensor]:
        """The feature maps of the layers, `(B, D, rows, columns)` each."""
        pixels_B3HW = pixels_B3HW.to(self._device)
        pixels_B3HW = (pixels_B3HW - self._mean_3[:, None, None]) / self._std_3[:, None, None]
        maps: list[torch.Tensor] = self._model.forward_intermediates(
            pixels_B3HW.to(self._dtype, memory_format=torch.channels_last),
            indices=self._layers,
            norm=self._has_blocks,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        return maps


def _layers(name: str, reductions: list[int], wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """`wanted`, or by default the deepest layer nearest to each of `_REDUCTIONS`: of blocks, which
    are alike, the last."""
    places = range(len(reductions))
    if not wanted:
        nearest = {
            min(places, key=lambda place: (abs(math.log(reductions[place] / aim)), -place))
            for aim in _REDUCTIONS
        }
        return tuple(sorted(nearest))
    if list(wanted) != sorted(set(wanted) & set(places)):
        raise BackboneError(
            f"timm:{name} has {'blocks' if len(set(reductions)) == 1 else 'stages'} 0 to"
            f" {places[-1]}: choose reference_layers among them, in ascending order (got {wanted})"
        )
    return wanted


def _size(name: str, model: Any, reductions: list[int], wanted: int | None) -> int:
    """`wanted`, or by default a size that the model takes; BackboneError if it cannot."""
    native: int = model.pretrained_cfg["input_size"][-1]
    is_fixed = model.pretrained_cfg["fixed_input_size"]
    if is_fixed and not hasattr(model, "set_input_size"):
        if wanted not in (None, native):
            raise BackboneError(
                f"timm:{name} only takes images of {native} pixels a side: leave out"
                f" reference_input_size (got {wanted})"
            )
        return native
    multiple = max(reductions)
    has_blocks = multiple == min(reductions)
    if wanted is None and is_fixed and not has_blocks:
        return native
    near = wanted or (_SIZE_OF_BLOCKS if has_blocks else _SIZE_OF_STAGES)
    nearest = multiple * max(1, round(near / multiple))
    if wanted not in (None, nearest):
        raise BackboneError(
            f"timm:{name} takes images of a multiple of {multiple} pixels a side: choose a"
            f" reference_input_size of {nearest}, the nearest to {wanted}"
        )
    return nearest


def _load(name: str, weights: Path | None) -> Any:
    """The whole model with its weights."""
    timm = import_timm()
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=5)
        raise BackboneError(
            f"timm has no model {architecture!r}: "
            + (f"did you mean {', '.join(close)}? " if close else "")
            + "`python -c 'import timm; print(timm.list_models())'` lists all"
        )
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise BackboneError(
            f"timm has no weights {tag!r} of {architecture}: its tags are"
            f" {', '.join(tags) or 'none'}"
        )
    published = timm.get_pretrained_cfg(name)
    if weights is None and not published.has_weights:
        raise BackboneError(
            f"timm has no weights of {architecture}: give a checkpoint file as reference_pretrained"
        )
    overlay = None if weights is None else _read(weights, name, published.classifier)
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except OSError as error:  # of the hub's client, too
        raise BackboneError(
            f"cannot download the weights of timm:{name} ({_brief(error)}): give their file as"
            f" reference_pretrained, or set HF_HOME to a cache that holds them, or HF_ENDPOINT to a"
            f" mirror that can be reached"
        ) from error
    except Exception as error:  # safetensors, pickle, torch and each model's own
        remedy = (
            "remove them from the cache (HF_HOME), and see what HF_ENDPOINT serves"
            if weights is None
            else "check reference_encoder and reference_pretrained"
        )
        raise BackboneError(
            f"{weights or 'what was downloaded'} does not hold the weights of timm:{name}"
            f" ({_brief(error)}): {remedy}"
        ) from error
    model.pretrained_cfg.pop("state_dict", None)  # a second copy of the weights
    return model.eval().requires_grad_(False)


def _read(path: Path, name: str, classifier: object) -> dict[str, Any]:
    """What in timm's description of a model a checkpoint file replaces."""
    if not path.is_file():
        raise BackboneError(
            f"{path} is missing, the checkpoint file of timm:{name} (reference_pretrained): put it"
            f" there again, or fit with another"
        )
    try:
        state = import_timm().models.load_state_dict(str(path), weights_only=True)
        if not state:
            raise ValueError("it is empty")
    except Exception as error:  # safetensors, pickle and torch raise many kinds
        raise BackboneError(
            f"cannot read {path} ({_brief(error)}): reference_pretrained must be a"
            f" checkpoint of timm:{name}, as safetensors or torch writes it, of nothing but tensors"
        ) from error
    head = state.get(f"{classifier}.weight")  # of as many classes as it was trained for
    classes = {} if head is None else {"num_classes": len(head), "label_offset": 0}
    return {"state_dict": state, **classes}


def _brief(error: Exception) -> str:
    """Its beginning: torch lists every weight that is missing."""
    return shorten(str(error), 300)
