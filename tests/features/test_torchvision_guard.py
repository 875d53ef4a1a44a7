import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apt_ray.features.torchvision_guard import compiled_operators_load, import_open_clip


def test_open_clip_imports_and_builds_a_model() -> None:
    open_clip = import_open_clip()
    assert "ViT-B-16" in open_clip.list_models()


def test_the_guard_acts_only_where_the_compiled_operators_cannot_load() -> None:
    import_open_clip()
    import torchvision

    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    if compiled_operators_load():
        kept = torchvision.ops.nms(boxes, torch.tensor([0.5, 0.9]), 0.5)
        assert kept.tolist() == [1]
    else:
        with pytest.raises(NotImplementedError):
            torch.ops.torchvision.nms(boxes, torch.tensor([0.5, 0.9]), 0.5)


def test_a_torchvision_whose_operators_cannot_load_is_no_obstacle(tmp_path: Path) -> None:
    """A stand-in whose library is broken and whose Python code refers to the operator."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "_C.so").write_bytes(b"not a library")
    (package / "__init__.py").write_text(
        "import torch\n"
        "torch.library.register_fake('torchvision::nms')(lambda *boxes: None)\n"
        "print('imported')\n"
    )
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from apt_ray.features.torchvision_guard import _declare_missing_operators\n"
        "_declare_missing_operators()\n"
        "import torchvision\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert answer.stdout == "imported\n", answer.stderr
