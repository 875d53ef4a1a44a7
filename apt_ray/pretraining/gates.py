"""What a backbone must do on generated kinds that it never saw, before it is shipped.

`python -m apt_ray.pretraining.gates [--weights DIR] [--json FILE]` prints, for surfaces and defects
absent from training, the AUROC of hand-written prompts, the participation ratio of the patch
tokens, and whether prompts can be learned: on four good pictures of a product, learned prompts are
set against *free directions*, two vectors of the joint space trained by the same loss on the same
anomaly bank. What no prompt can say is lost between the two.

Shapes: X pictures of a bank, N patches, P prompts, E joint width.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from apt_ray.anomalies.bank import SupportBank, encode_support
from apt_ray.anomalies.spec import BankSpec
from apt_ray.cli.flags import count
from apt_ray.config import BACKBONE, BackboneSpec, FitSettings
from apt_ray.detection.reference import ReferenceMemory
from apt_ray.detection.rule import (
    anomalous_probability,
    anomaly_maps,
    top_mean,
)
from apt_ray.features.builtin.apt_mini import load_builtin
from apt_ray.features.clip import FrozenCLIP
from apt_ray.features.pixels import to_image
from apt_ray.features.protocol import ImageFeatures
from apt_ray.features.weights import BUILTIN_FOLDER
from apt_ray.files import write_json
from apt_ray.pretraining.defects import HELD_OUT_DEFECTS, TRAINING_DEFECTS
from apt_ray.pretraining.generator import Pairs, generate
from apt_ray.pretraining.losses import participation_ratio
from apt_ray.pretraining.surfaces import HELD_OUT_SURFACES, TRAINING_SURFACES
from apt_ray.prompts.guidance import meta_features
from apt_ray.prompts.lanes import Lane
from apt_ray.prompts.losses import gradients_at_text
from apt_ray.prompts.trainer import PromptTrainer
from apt_ray.validation.metrics import image_auroc, pixel_auroc

MIN_PIXEL_AUROC = 0.85
MIN_PARTICIPATION_RATIO = 15.0
MAX_LOSS_TO_FREE = 0.02

_SHOTS = 4
_STRENGTHS = (0.1, 0.3)
_LEARNING_RATES = (0.03, 0.1)
_LENGTHS = (4, 8)
_FREE_RATES = (0.01, 0.03)
_FREE_STEPS = 150
_SEED = 2**42


@dataclass(frozen=True, kw_only=True, slots=True)
class KindFigures:
    """Products of some kinds; AUROC in 0..1 of hand-written prompts, reference and both."""

    surfaces: str
    defects: str
    pixel_auroc: dict[str, float]
    image_auroc: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnedFigures:
    """One product: the best pixel AUROC of each way to say what is anomalous."""

    surface: str
    seed: int
    hand_written: float
    learned: float
    free: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything measured, and the gates."""

    kinds: tuple[KindFigures, ...]
    learned: tuple[LearnedFigures, ...]
    participation_ratio: float

    def gates(self) -> dict[str, bool]:
        """Which demands hold, by what they demand."""
        unseen = self.kinds[-1].pixel_auroc["prompts"]
        hand_written, learned, free = (
            fmean(getattr(figures, name) for figures in self.learned)
            for name in ("hand_written", "learned", "free")
        )
        return {
            f"pixel AUROC of hand-written prompts on unseen kinds at least {MIN_PIXEL_AUROC}"
            f" ({unseen:.3f})": unseen >= MIN_PIXEL_AUROC,
            f"participation ratio at least {MIN_PARTICIPATION_RATIO:.0f}"
            f" ({self.participation_ratio:.1f})": self.participation_ratio
            >= MIN_PARTICIPATION_RATIO,
            f"best learned prompt within {MAX_LOSS_TO_FREE} of the best free direction"
            f" ({learned:.3f}, {free:.3f})": learned >= free - MAX_LOSS_TO_FREE,
            f"best learned prompt ahead of the hand-written one"
            f" ({learned:.3f}, {hand_written:.3f})": learned > hand_written,
        }


def measure_backbone(
    backbone: FrozenCLIP,
    *,
    pairs: int = 256,
    products: int = 3,
    test_pairs: int = 48,
    surfaces: Sequence[str] = tuple(HELD_OUT_SURFACES),
) -> Report:
    """Measure everything; prompts are learned for `products` products of each of `surfaces`."""
    kinds, tokens = [], []
    for (surface_group, shown), (defect_group, defects) in product(
        (("seen", TRAINING_SURFACES), ("held out", HELD_OUT_SURFACES)),
        (("seen", TRAINING_DEFECTS), ("held out", HELD_OUT_DEFECTS)),
    ):
        figures, tokens_PNE = _measure_kinds(backbone, pairs, tuple(shown), tuple(defects))
        kinds.append(KindFigures(surfaces=surface_group, defects=defect_group, **figures))
        tokens.append(tokens_PNE)
    learned = [
        _learn(backbone, surface, seed, test_pairs)
        for surface, seed in product(surfaces, range(products))
    ]
    return Report(
        kinds=tuple(kinds),
        learned=tuple(learned),
        participation_ratio=participation_ratio(tokens[-1].flatten(0, 1)).item(),
    )


def _measure_kinds(
    backbone: FrozenCLIP, pairs: int, surfaces: Sequence[str], defects: Sequence[str]
) -> tuple[dict[str, dict[str, float]], Tensor]:
    drawn = generate(
        _SEED + torch.arange(pairs),
        size=backbone.input_size,
        surfaces=surfaces,
        defects=defects,
        defect_rate=0.5,
    )
    query = backbone.encode_in_batches(drawn.query_P3HW)
    reference = backbone.encode_in_batches(drawn.reference_P3HW)
    constants = backbone.constants
    distance_PN = torch.stack(
        [
            torch.cat(
                list(ReferenceMemory.of(reference[i : i + 1]).distances(query[i : i + 1]).values())
            ).mean(0)
            for i in range(pairs)
        ]
    )
    p_prompt = anomalous_probability(query.tokens_BNE, meta_features(backbone), constants)
    p_ref = constants.reference_probability(distance_PN)
    ways = {"prompts": p_prompt, "reference": p_ref, "both": 2 / (1 / p_prompt + 1 / p_ref)}
    is_anomalous = drawn.mask_PHW.flatten(1).any(1).numpy()
    figures = {
        "pixel_auroc": {way: _pixel_auroc(backbone, p, drawn) for way, p in ways.items()},
        "image_auroc": {
            way: image_auroc(top_mean(p).numpy(), is_anomalous) for way, p in ways.items()
        },
    }
    return figures, query.tokens_BNE


def _learn(backbone: FrozenCLIP, surface: str, seed: int, test_pairs: int) -> LearnedFigures:
    good, test = _product(surface, seed, test_pairs, backbone.input_size)
    spec = BankSpec(
        fingerprint=backbone.fingerprint,
        support=tuple(f"{surface} {seed} {place}" for place in range(len(good))),
        seed=seed,
        strengths=tuple(_STRENGTHS),
    )
    bank = encode_support(backbone, good, spec)
    features = backbone.encode_in_batches(test.query_P3HW)

    def best(texts: Sequence[Tensor]) -> float:
        return max(_text_auroc(backbone, features, text_PE, test) for text_PE in texts)

    lanes = [
        Lane(
            settings=FitSettings(
                noise_strength=strength, learning_rate=rate, context_length=length, seed=seed
            ),
            bank=bank,
            images=tuple(range(bank.shots)),
            seed=seed,
        )
        for strength, rate, length in product(_STRENGTHS, _LEARNING_RATES, _LENGTHS)
    ]
    trainer = PromptTrainer(backbone, lanes)
    trainer.advance(lanes[0].settings.steps)
    free = [
        train_free_direction(backbone, bank, strength=strength, rate=rate, seed=seed)
        for strength, rate in product(_STRENGTHS, _FREE_RATES)
    ]
    return LearnedFigures(
        surface=surface,
        seed=seed,
        hand_written=best([meta_features(backbone)]),
        learned=best(list(trainer.text_features())),
        free=best(free),
    )


def train_free_direction(
    backbone: FrozenCLIP, bank: SupportBank, *, strength: float, rate: float, seed: int
) -> Tensor:
    """(2, E) L2-normalised vectors that any point of the joint space may be, trained with Adam on
    the whole bank by the loss of prompt tuning."""
    tokens_XNE = torch.cat(
        (bank.noisy_SDNE[strength].flatten(0, 1), bank.clean_SVNE.flatten(0, 1))
    ).float()
    noisy_XN = bank.noisy_labels_SDN.flatten(0, 1)
    clean_XN = noisy_XN.new_zeros(len(tokens_XNE) - len(noisy_XN), noisy_XN.shape[1])
    labels_XN = torch.cat((noisy_XN, clean_XN))
    generator = torch.Generator().manual_seed(seed)
    free_PE = torch.randn(2, tokens_XNE.shape[-1], generator=generator, requires_grad=True)
    optimizer = torch.optim.Adam([free_PE], lr=rate)
    for _ in range(_FREE_STEPS):
        text_PE = F.normalize(free_PE, dim=-1)
        ((at_text_PE,),) = gradients_at_text(
            tokens_XNE[None], labels_XN[None], text_PE.detach()[None], None, backbone.constants
        )
        optimizer.zero_grad()
        text_PE.backward(at_text_PE)
        optimizer.step()
    return F.normalize(free_PE.detach(), dim=-1)


def _product(
    surface: str, seed: int, test_pairs: int, size: int
) -> tuple[list[Image.Image], Pairs]:
    """Good pictures of one product, and other pictures of it, half of them defective."""
    count = _SHOTS + test_pairs
    pairs = generate(
        _SEED + 10_000 * (1 + seed) + torch.arange(count),
        size=size,
        surfaces=(surface,),
        defects=tuple(HELD_OUT_DEFECTS),
        defect_rate=0.5,
        product_seeds_P=torch.full((count,), _SEED + seed),
    )
    good = [to_image(picture_3HW) for picture_3HW in pairs.reference_P3HW[:_SHOTS]]
    return good, pairs[_SHOTS:]


def _text_auroc(
    backbone: FrozenCLIP, features: ImageFeatures, text_PE: Tensor, test: Pairs
) -> float:
    p_PN = anomalous_probability(features.tokens_BNE, text_PE, backbone.constants)
    return _pixel_auroc(backbone, p_PN, test)


def _pixel_auroc(backbone: FrozenCLIP, p_PN: Tensor, pairs: Pairs) -> float:
    maps_PHW = anomaly_maps(p_PN, backbone.grid, backbone.input_size)
    return pixel_auroc(list(maps_PHW.numpy()), list(pairs.mask_PHW.numpy()))


def format_report(report: Report) -> str:
    """Tables and gates for people."""
    lines = [
        "| surfaces | defects | prompts pixel / image | reference | both |",
        "|---|---|---|---|---|",
    ]
    for kind in report.kinds:
        cells = " | ".join(
            f"{kind.pixel_auroc[way]:.3f} / {kind.image_auroc[way]:.3f}"
            for way in ("prompts", "reference", "both")
        )
        lines.append(f"| {kind.surfaces} | {kind.defects} | {cells} |")
    lines += [
        "",
        "| surface | hand-written | best learned | best free direction |",
        "|---|---|---|---|",
    ]
    for surface in dict.fromkeys(figures.surface for figures in report.learned):
        group = [figures for figures in report.learned if figures.surface == surface]
        cells = " | ".join(
            f"{np.mean([getattr(figures, name) for figures in group]):.3f}"
            for name in ("hand_written", "learned", "free")
        )
        lines.append(f"| {surface} | {cells} |")
    lines.append("")
    lines += [f"{'PASS' if holds else 'FAIL'}  {gate}" for gate, holds in report.gates().items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m apt_ray.pretraining.gates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--weights", type=Path, default=BUILTIN_FOLDER, help="folder of the weights"
    )
    parser.add_argument("--pairs", type=count, default=256, help="pairs of every group of kinds")
    parser.add_argument("--products", type=count, default=3, help="products a kind of surface")
    parser.add_argument("--test-pairs", type=count, default=48, help="test pictures a product")
    parser.add_argument(
        "--surfaces",
        nargs="+",
        choices=tuple(HELD_OUT_SURFACES),
        default=list(HELD_OUT_SURFACES),
        help="kinds of surface whose products prompts are learned for (all)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    options = parser.parse_args(arguments)
    builtin = load_builtin(options.weights)
    backbone = FrozenCLIP(
        builtin.model,
        builtin.tokenizer,
        spec=BackboneSpec(reference_encoder=BACKBONE),
        constants=builtin.constants,
    )
    report = measure_backbone(
        backbone,
        pairs=options.pairs,
        products=options.products,
        test_pairs=options.test_pairs,
        surfaces=options.surfaces,
    )
    print(format_report(report))
    if options.json is not None:
        result = {**asdict(report), "gates": report.gates()}
        write_json(options.json, result)


if __name__ == "__main__":
    main()
