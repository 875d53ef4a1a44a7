"""What each term of the pretraining loss is worth: `python benchmarks/pretraining_ablation.py`.

Every variant goes on from the shipped weights for the same number of steps, on the same images,
with one setting changed; the figures are those of generated kinds of surface and defect that
training never shows. Writes a table (Markdown) to `--out` after every variant, so a run that is
stopped keeps what it has.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from apt_ray.files import write_whole
from apt_ray.pretraining.measuring import encode_held_out, fit_constants, measure, state_features
from apt_ray.pretraining.settings import TrainSettings
from apt_ray.pretraining.train import train

VARIANTS: dict[str, dict[str, Any]] = {
    "all terms": {},
    "without the pooled term": {"pooled_weight": 0.0},
    "without the reference term": {"reference_weight": 0.0},
    "without the linear heads": {"head_weight": 0.0},
    "without phrases": {"phrase_weight": 0.0, "contrast_weight": 0.0},
    "without contrast": {"contrast_weight": 0.0},
    "without the spread term": {"spread_weight": 0.0},
    "without token jitter": {"token_jitter": 0.0},
    "pooled_weight 1": {"pooled_weight": 1.0},
    "focus 1": {"focus": 1.0},
    "focus 1, pooled_weight 1": {"focus": 1.0, "pooled_weight": 1.0},
    "small images only": {"sizes": {0.0: 64}},
}
_FIT_SEED, _MEASURE_SEED = 2**40, 2**41


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="steps of each variant")
    parser.add_argument("--pairs", type=int, default=384, help="held-out pairs to measure on")
    parser.add_argument("--batch-pairs", type=int, default=16, help="pairs of images a step")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--start", choices=("shipped", "scratch"), default="shipped")
    parser.add_argument("--variants", nargs="*", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("docs/pretraining-ablation.md"))
    options = parser.parse_args()
    rows = [
        f"{options.steps} steps of {options.batch_pairs} pairs from {options.start}; AUROC in"
        f" percent on held-out kinds, {options.pairs} pairs of 128 px",
        "",
        "| variant | prompts pixel / image | reference pixel / image | participation ratio |",
        "|---|---|---|---|",
    ]
    for name in options.variants:
        values = {
            "steps": options.steps,
            "start": options.start,
            "batch_pairs": options.batch_pairs,
            **VARIANTS[name],
        }
        settings = TrainSettings.model_validate(values)
        rows.append(f"| {name} | {_figures(settings, options.pairs, options.device)} |")
        print(rows[-1], flush=True)
        write_whole(options.out, "\n".join(rows) + "\n")


def _figures(settings: TrainSettings, pairs: int, device: str) -> str:
    with TemporaryDirectory() as folder:
        run = train(settings, Path(folder), device=device, report=lambda line: None)
    model = run.trained_model().eval()
    states_2E = state_features(model, run.vocabulary)
    constants = fit_constants(encode_held_out(model, pairs=pairs, seed=_FIT_SEED), states_2E)
    held_out = encode_held_out(model, pairs=pairs, seed=_MEASURE_SEED)
    figures = measure(held_out, states_2E, constants)
    return (
        f"{100 * figures.pixel_auroc_prompts:.1f} / {100 * figures.image_auroc_prompts:.1f} |"
        f" {100 * figures.pixel_auroc_reference:.1f} / {100 * figures.image_auroc_reference:.1f} |"
        f" {figures.participation_ratio:.1f}"
    )


if __name__ == "__main__":
    main()
