import json
import sys
from pathlib import Path

import pytest

from benchmarks import fuzz


@pytest.mark.filterwarnings("ignore")  # Pillow's remarks on damaged files
def test_damaged_input_is_read_or_refused_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tmp_path / "counts.json"
    monkeypatch.setattr(sys, "argv", ["fuzz", "--inputs", "50", "--json", str(written)])
    assert fuzz.main() == 0
    result = json.loads(written.read_text())
    assert result["unexpected"] == []
    for kind, found in result["kinds"].items():
        assert sum(found["outcomes"].values()) == 50, kind
    assert result["kinds"]["forms without their end"]["outcomes"] == {"400": 50}
    assert result["kinds"]["metadata"]["outcomes"] == {"decoded": 50}
