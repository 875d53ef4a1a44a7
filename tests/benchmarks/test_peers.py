import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from apt_ray.features.trunk import Trunk
from benchmarks.anomalib_models import load_trunk
from benchmarks.ledger import Ledger, Row
from benchmarks.peers import main
from benchmarks.tables import format_claims, format_rows


def row(method: str, seed: int, *, peak_mb: float | None) -> Row:
    return Row(
        method=method,
        category="tile",
        shots=4,
        seed=seed,
        image_auroc=0.9,
        pixel_auroc=None,
        aupro=None,
        good_rejected=None,
        defects_found=None,
        fit_seconds=1.5,
        image_ms=20.0,
        peak_mb=peak_mb,
    )


@pytest.mark.slow
def test_apt_is_measured_in_processes_of_its_own(
    sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    name = min(sample_data.iterdir()).name
    command = ["--data", str(sample_data), "--categories", name, "--methods", "apt"]
    command += ["--shots", "1", "--seeds", "0", "--threads", "1", "--json", str(file)]
    assert main(command) == 0
    assert "| ms per image | peak MB |" in capsys.readouterr().out
    (first,) = json.loads(file.read_text())
    assert (first["method"], first["category"], first["shots"]) == ("apt", name, 1)
    assert first["image_auroc"] > 0.5
    assert 200 < first["peak_mb"] < 10_000
    # What is finished is not measured again: seconds never repeat themselves.
    assert main(command) == 0
    assert json.loads(file.read_text()) == [first]
    assert main([*command, "--input-size", "160"]) == 1
    assert "made with another backbone" in capsys.readouterr().err


def test_where_anomalib_is_missing_the_way_to_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "anomalib", None)
    assert main(["--data", str(tmp_path), "--methods", "apt", "padim"]) == 1
    assert "error: this needs anomalib: run it by `make peers`" in capsys.readouterr().err


def test_peers_read_what_the_trunk_reads() -> None:
    pixels_B3HW = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    x_BDHW = 2 * pixels_B3HW - 1
    with torch.no_grad():
        model = load_trunk()
        x_BDHW = model.bn1(model.conv_stem(x_BDHW))
        for block in model.blocks[:3]:
            x_BDHW = block(x_BDHW)
    ours = Trunk(stages=(2,), input_size=64, pool=1).encode(pixels_B3HW)
    theirs_BND = x_BDHW.flatten(2).mT
    assert torch.allclose(ours[0], F.normalize(theirs_BND, dim=-1), atol=1e-4)
    assert torch.allclose(ours[1], theirs_BND, rtol=1e-3, atol=1e-3)


def test_the_highest_peak_of_memory_is_shown_where_there_is_one() -> None:
    ledger = Ledger(None, {})
    for seed, peak_mb in enumerate((700.0, 800.4)):
        ledger.add(row("apt", seed, peak_mb=peak_mb), {})
        ledger.add(row("padim", seed, peak_mb=None), {})
    table = format_rows(ledger).splitlines()
    assert table[0].endswith("| s per fit | ms per image | peak MB |")
    assert table[2].endswith("| 1.5 | 20.0 | 800 |")
    assert table[3].endswith("| 1.5 | 20.0 | - |")
    assert len({line.count("|") for line in table}) == 1
    assert format_claims(ledger).count("\n") == 1
