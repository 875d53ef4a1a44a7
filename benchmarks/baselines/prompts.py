"""APT itself, and what is left of it when a part is taken away.

T texts, P prompts, E joint width.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from apt_ray.config import FitSettings
from apt_ray.detection.detector import Detector
from apt_ray.detection.rule import Scale, Scales, anomalous_log_odds
from apt_ray.features.clip import FrozenCLIP
from apt_ray.pretraining.gates import train_free_direction
from apt_ray.prompts.fit import fit as fit_prompt_set
from apt_ray.prompts.guidance import meta_features
from benchmarks.baselines.support import Encoded, ImageRule, PatchRule, Support

_FREE_RATE = 0.03


def fit_apt(support: Support) -> dict[str, ImageRule]:
    """APT as `apt_ray.fit` does it, with its default settings."""
    return _fit(support, "apt", support.settings, support.backbone)


def fit_coop(support: Support) -> dict[str, ImageRule]:
    """The same prompts without SMGS: plain context optimisation, as in CoOp."""
    settings = support.settings.model_copy(update={"smgs_weight": 0.0})
    return _fit(support, "coop", settings, support.backbone)


def fit_random_text(support: Support) -> dict[str, ImageRule]:
    """The same prompts, without SMGS, through a text encoder that never learned a word."""
    settings = support.settings.model_copy(update={"smgs_weight": 0.0})
    backbone = with_random_text(support.backbone, support.seed)
    return _fit(support, "random-text", settings, backbone)


def fit_handwritten(support: Support) -> dict[str, ImageRule]:
    """Written states that fit any product; nothing is learned."""
    return support.with_memory("handwritten", _odds(support, meta_features(support.backbone)))


def fit_free(support: Support) -> dict[str, ImageRule]:
    """Two vectors of the joint space, trained on the same bank: no text encoder at all."""
    text_PE = train_free_direction(
        support.backbone,
        support.bank,
        strength=support.settings.noise_strength,
        rate=_FREE_RATE,
        seed=support.seed,
    )
    return support.with_memory("free", _odds(support, text_PE))


def fit_reference(support: Support) -> dict[str, ImageRule]:
    """APT's own memory by APT's own rule, without any prompts."""
    memory, layers = support.remembered
    rule = replace(support.rule, reference_weight=1.0)
    scales = Scales(prompts=Scale(mean=0, sd=1), layers=layers)

    def score(encoded: Encoded) -> tuple[Tensor, Tensor]:
        tokens_BNE = encoded.features.tokens_BNE
        nothing_BN = torch.zeros(tokens_BNE.shape[:2], device=tokens_BNE.device)
        return rule.score_evidence(nothing_BN, memory.distances(encoded.features), scales)

    return {"reference": ImageRule(score=score)}


def _odds(support: Support, text_PE: Tensor) -> PatchRule:
    constants = support.backbone.constants
    return lambda encoded: anomalous_log_odds(encoded.features.tokens_BNE, text_PE, constants)


def _fit(
    support: Support, name: str, settings: FitSettings, backbone: FrozenCLIP
) -> dict[str, ImageRule]:
    prompt_set = fit_prompt_set(
        support.category, support.paths, settings, backbone=backbone, bank=support.bank
    )
    detector = Detector(backbone, prompt_set)
    text_PE = prompt_set.text_features.to(backbone.device)
    return {
        name: ImageRule(
            score=lambda encoded: detector.score(encoded.features),
            threshold=prompt_set.threshold,
        ),
        f"{name}-alone": support.alone(_odds(support, text_PE)),
    }


def with_random_text(backbone: FrozenCLIP, seed: int) -> FrozenCLIP:
    """The same backbone with a text tower whose weights are drawn anew, tensor by tensor, from
    normal distributions of the same means and standard deviations."""
    model = copy.deepcopy(backbone.model)
    g = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if not name.startswith("visual.") and weight.numel() > 1:
            drawn = torch.randn(weight.shape, generator=g).to(weight.device)
            weight.data = weight.mean() + weight.std() * drawn
    return FrozenCLIP(
        model,
        backbone.tokenize,
        spec=backbone.spec,
        constants=backbone.constants,
        device=str(backbone.device),
    )
