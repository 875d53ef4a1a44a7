"""What tells frozen encoders apart."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn


def fingerprint(description: Mapping[str, Any], model: nn.Module) -> str:
    """Hex digest over a model's weights and whatever else shapes its features."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
