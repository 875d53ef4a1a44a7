"""Where the time of a fit goes: `python -m benchmarks.fit_cost [--json FILE]`.

Each part of a fit is timed alone on what the fit really does, and set beside its floor: its
floating-point operations at the speed of a large matrix product of the same precision, measured in
the same run. A part
whose cost is memory or dispatch has a floor far below its time.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import torch
from torch.utils.flop_counter import FlopCounterMode

from apt_ray.config import FitSettings, Precision
from apt_ray.features.protocol import Backbone
from apt_ray.prompts.batches import draw_batches
from apt_ray.prompts.fit import fit
from apt_ray.prompts.guidance import meta_features
from apt_ray.prompts.lanes import Lane
from apt_ray.prompts.losses import gradients_at_text
from apt_ray.prompts.remember import remember
from apt_ray.prompts.trainer import PromptTrainer
from benchmarks.common import (
    load,
    median_seconds,
    sample_bank,
    sample_images,
    timed,
)
from benchmarks.rows import Row, compared, write_rows

_SIDE = 1024


def main() -> None:
    """Time a fit and its parts and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="builtin", help="or an architecture, e.g. ViT-B-16")
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--precision", choices=get_args(Precision), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3, help="of each; the median counts")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    backbone = load(options.backbone, device=options.device, precision=options.precision)
    ceiling = _ceiling(backbone, options.repeats)
    settings = FitSettings(steps=options.steps)
    images = sample_images(options.shots)
    bank = sample_bank(backbone, images, strengths=[0.3])
    lanes = [Lane(settings=settings, bank=bank, images=tuple(range(bank.shots)), seed=0)]
    pixels_S3HW = backbone.preprocess(images)
    parts: dict[str, tuple[Callable[[], object], int]] = {
        "encoding": (
            lambda: sample_bank(backbone, images, strengths=[0.3]),
            1,
        ),
        **{name: (part, options.steps) for name, part in _parts_of_a_step(backbone, lanes).items()},
        "all steps": (lambda: PromptTrainer(backbone, lanes).advance(options.steps), 1),
        "remembering": (lambda: remember(bank.support, pixels_S3HW, settings, backbone), 1),
    }
    rows = []
    for name, (part, times) in parts.items():
        seconds = times * median_seconds(part, backbone.device, options.repeats)
        floor = times * _operations(part) / ceiling
        rows.append(_row(name, seconds, floor))
    with TemporaryDirectory() as folder:
        paths = []
        for number, image in enumerate(images):
            paths.append(Path(folder) / f"{number}.png")
            image.save(paths[-1])
        whole = median_seconds(
            lambda: fit("washer", paths, settings, backbone=backbone),
            backbone.device,
            options.repeats,
        )
    whole_parts = ("encoding", "all steps", "remembering")
    floor_ms = sum(row["baseline"] for row in rows if row["name"] in whole_parts)
    rows.append(_row("the whole fit", whole, floor_ms / 1000))
    print(
        f"{options.backbone}, {options.precision}, {backbone.input_size} px, {options.shots} shots,"
        f" {options.steps} steps; {options.threads} threads on"
        f" {backbone.device}, ceiling {ceiling / 1e9:.0f} GFLOP/s; baseline is the floor\n"
    )
    write_rows(rows, options.json)


def _parts_of_a_step(backbone: Backbone, lanes: list[Lane]) -> dict[str, Callable[[], object]]:
    """A step of all lanes in its parts, on tensors of the step's own sizes."""
    settings = lanes[0].settings
    generators = [torch.Generator().manual_seed(lane.seed) for lane in lanes]

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        return draw_batches(lanes, generators, backbone.device)

    tokens_TBNE, labels_TBN = draw()
    shape = (2 * len(lanes), settings.context_length, backbone.token_width)
    contexts_XLC = backbone.token_std * torch.randn(shape, device=backbone.device)
    contexts_XLC.requires_grad_(True)
    lengths_X = torch.full((len(contexts_XLC),), settings.context_length)
    meta_T2E = meta_features(backbone).expand(len(lanes), -1, -1)

    def encode_text() -> torch.Tensor:
        return backbone.encode_contexts(contexts_XLC, lengths_X)

    text_XE = encode_text()
    upstream_XE = torch.randn_like(text_XE)

    def walk_back() -> object:
        return torch.autograd.grad(text_XE, contexts_XLC, upstream_XE, retain_graph=True)

    def losses() -> object:
        text_TPE = text_XE.detach().reshape(len(lanes), 2, -1)
        return gradients_at_text(tokens_TBNE, labels_TBN, text_TPE, meta_T2E, backbone.constants)

    return {
        "drawing batches": draw,
        "text forward": encode_text,
        "text backward, for the loss": walk_back,
        "text backward, for SMGS": walk_back,
        "losses and their gradients to the text": losses,
    }


def _ceiling(backbone: Backbone, repeats: int) -> float:
    """Operations a second of a large product of matrices of the backbone's precision."""
    device, dtype = backbone.device, getattr(torch, backbone.spec.precision)
    a, b = (torch.randn(_SIDE, _SIDE, device=device, dtype=dtype) for _ in range(2))
    return 2 * _SIDE**3 / min(timed(lambda: a @ b, device) for _ in range(5 + repeats))


def _operations(part: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        part()
    return counter.get_total_flops()


def _row(name: str, seconds: float, floor: float) -> Row:
    return compared(name, 1000 * seconds, 1000 * floor, "ms")


if __name__ == "__main__":
    main()
