import json
from pathlib import Path

import numpy as np
from PIL import Image

from apt_ray.pretraining.defects import DEFECTS
from apt_ray.pretraining.drawings import main
from apt_ray.pretraining.surfaces import SURFACES


def test_the_sheet_shows_every_kind(tmp_path: Path) -> None:
    main(["sheet", "--out", str(tmp_path / "sheet.png")])
    with Image.open(tmp_path / "sheet.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    red = (pixels[..., 0] == 255) & (pixels[..., 1] == 0) & (pixels[..., 2] == 0)
    rows = -(-(len(SURFACES) + len(DEFECTS)) // 3)
    bands = red.reshape(rows, -1, red.shape[1]).any(axis=(1, 2))
    assert bands.all(), "an outlined defect in every row of kinds"


def test_the_curve_is_drawn_from_the_runs_file(tmp_path: Path) -> None:
    terms = ("dense", "reference", "heads", "image", "pooled", "phrases")
    lines = [
        json.dumps({"step": step, **{name: 1 / step + index for index, name in enumerate(terms)}})
        for step in range(1, 50)
    ]
    (tmp_path / "curve.jsonl").write_text("\n".join(lines))
    main(["curve", str(tmp_path / "curve.jsonl"), "--out", str(tmp_path / "curve.png")])
    with Image.open(tmp_path / "curve.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
