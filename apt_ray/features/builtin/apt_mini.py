"""apt-mini, the built-in vision-language backbone: its file format, loading and saving.

The files beside this module:

- `apt-mini.json`: architecture and pixel statistics, in the layout of open_clip's hub configs.
- `apt-mini.safetensors`: the weights in float16. Of the token table only the trained rows are
  stored; the others are drawn from a seed in the header, so every machine rebuilds the same table.
  The header also holds the constants that turn similarities into probabilities.
- `apt-mini.sha256`: the digest of the weights, as `sha256sum` writes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from apt_ray.errors import BackboneError
from apt_ray.features.torchvision_guard import import_open_clip
from apt_ray.features.weights import (
    BUILTIN,
    BUILTIN_FOLDER,
    builtin_weights,
    read_weights,
)
from apt_ray.files import write_whole

if TYPE_CHECKING:
    from open_clip import CLIP, SimpleTokenizer
from apt_ray.features.constants import BackboneConstants

_TABLE = "token_embedding.weight"


_ROWS = "token_embedding.rows"


_ROW_IDS = "token_embedding.row_ids"


_HEADER = "apt-mini/1"


_FILL_SEED = 0


class _Header(BaseModel):
    """What the weights file says beside its tensors, under one key so that its bytes are stable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    constants: BackboneConstants
    fill_seed: int
    fill_std: float = Field(gt=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltinBackbone:
    """apt-mini, ready for inference: float32, in eval mode, with `model.visual.image_mean/std`."""

    model: CLIP
    tokenizer: SimpleTokenizer
    constants: BackboneConstants


def build_model() -> CLIP:
    """An untrained model of the architecture in `apt-mini.json`, drawn from torch's generator."""
    open_clip = import_open_clip()
    config = json.loads(_architecture())
    model: CLIP = open_clip.CLIP(**config["model_cfg"])
    open_clip.model.set_model_preprocess_cfg(model, config["preprocess_cfg"])
    return model


def build_tokenizer() -> SimpleTokenizer:
    """CLIP's byte-pair tokenizer, cut to the model's context length."""
    open_clip = import_open_clip()
    config = json.loads(_architecture())
    context_length = config["model_cfg"]["text_cfg"]["context_length"]
    tokenizer: SimpleTokenizer = open_clip.SimpleTokenizer(context_length=context_length)
    return tokenizer


def load_builtin(folder: Path = BUILTIN_FOLDER) -> BuiltinBackbone:
    """Load the weights in `folder`; raises BackboneError if they are missing or damaged."""
    file = builtin_weights(folder)
    file.read()
    path = file.path
    try:
        with safe_open(path, framework="pt") as stored:
            header = _Header.model_validate_json((stored.metadata() or {})[_HEADER])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        model = build_model()
        model.load_state_dict(_unpack(tensors, header, model.state_dict()[_TABLE].shape))
    except (SafetensorError, ValidationError, KeyError, RuntimeError) as error:
        raise BackboneError(
            f"{path} does not fit this version of apt-ray: {file.remedy}"
        ) from error
    return BuiltinBackbone(
        model=model.eval().requires_grad_(False),
        tokenizer=build_tokenizer(),
        constants=header.constants,
    )


def save_builtin(
    model: CLIP,
    trained_ids: Sequence[int],
    constants: BackboneConstants,
    folder: Path = BUILTIN_FOLDER,
) -> Path:
    """Write weights and digest into `folder`, keeping only `trained_ids` of the token table."""
    tensors = {name: tensor.detach().half() for name, tensor in model.state_dict().items()}
    row_ids = torch.tensor(sorted(set(trained_ids)), dtype=torch.int32)
    rows = tensors.pop(_TABLE)[row_ids.long()].clone()
    header = _Header(constants=constants, fill_seed=_FILL_SEED, fill_std=rows.float().std().item())
    data = save({**tensors, _ROWS: rows, _ROW_IDS: row_ids}, {_HEADER: header.model_dump_json()})
    path = folder / f"{BUILTIN}.safetensors"
    write_whole(path, data)
    write_whole(path.with_suffix(".sha256"), f"{hashlib.sha256(data).hexdigest()}  {path.name}\n")
    return path


def _unpack(
    tensors: dict[str, torch.Tensor], header: _Header, table_shape: torch.Size
) -> dict[str, torch.Tensor]:
    rows, row_ids = tensors.pop(_ROWS), tensors.pop(_ROW_IDS)
    table = _fill(table_shape, header.fill_seed, header.fill_std)
    table[row_ids.long()] = rows.float()
    return {name: tensor.float() for name, tensor in tensors.items()} | {_TABLE: table}


def _fill(shape: torch.Size, seed: int, std: float) -> torch.Tensor:
    """Uniform rows of standard deviation `std`, the same on every platform and numpy version.

    numpy keeps the raw stream of a bit generator for good, but not that of its distributions;
    53 random bits and IEEE products leave no room for differences.
    """
    raw = np.random.PCG64(seed).random_raw(shape.numel())
    unit = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    table = ((unit * 2.0 - 1.0) * (std * 3.0**0.5)).astype(np.float32)
    return torch.from_numpy(table.reshape(tuple(shape)))


def _architecture() -> bytes:
    file = builtin_weights()
    return read_weights(file.path.with_suffix(".json"), file.remedy)
