"""PromptTrainer: many prompt sets, the lanes, trained together in one batch of the text encoder.

T lanes, P prompts (0 normal, the others anomalous), L longest context, C token width, B images a
step, N patch tokens, E joint width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from apt_ray.backbone import FrozenCLIP
from apt_ray.bank import SupportBank
from apt_ray.config import FitSettings
from apt_ray.errors import SettingsError
from apt_ray.guidance import ROUND, meta_features, move_meta, remove_conflict
from apt_ray.scoring import anomalous_probability, auroc, prompt_log_probabilities, top_mean

_NOISY, _CLEAN = 4, 4
_MOMENTUM = 0.9
_FOCAL_GAMMA = 2
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class Lane:
    """One prompt set in training.

    Attributes:
        settings: its own hyperparameters; `steps` is the length of its cosine schedule.
        bank: the support set that it learns from.
        images: which of the bank's support images it may see.
        seed: of its initial contexts and its batches.
    """

    settings: FitSettings
    bank: SupportBank
    images: tuple[int, ...]
    seed: int


class PromptTrainer:
    """Trains its lanes together; each comes out as if it had been trained alone.

    The optimiser is gradient descent with momentum 0.9 on each lane's gradient at unit length,
    with cosine decay: a learning rate is the first step's length as a fraction of the contexts'
    norm, and so means the same for every backbone. Adam would rescale single coordinates and
    thereby undo SMGS.

    Attributes:
        steps_done: steps taken so far.
        meta_T2E: each lane's meta-prompt, normal and anomalous.
    """

    def __init__(self, backbone: FrozenCLIP, lanes: Sequence[Lane]) -> None:
        self._backbone = backbone
        self._lanes = tuple(lanes)
        for lane in self._lanes:
            _check(lane, backbone)
        settings = [lane.settings for lane in self._lanes]
        device = backbone.device
        self._lengths_T = torch.tensor([s.context_length for s in settings], device=device)
        self._smgs_weight_T = torch.tensor([s.smgs_weight for s in settings], device=device)
        self._learning_rate_T = torch.tensor([s.learning_rate for s in settings], device=device)
        self._steps_T = torch.tensor([s.steps for s in settings], device=device)
        self._generators = [torch.Generator().manual_seed(lane.seed) for lane in self._lanes]
        self._is_penalty_T = torch.tensor([s.smgs == "penalty" for s in settings], device=device)
        self._diversity_T = torch.tensor([s.diversity_weight for s in settings], device=device)
        self._margin_T = torch.tensor([s.margin_weight for s in settings], device=device)
        counts = {1 + s.anomalous_prompts for s in settings}
        if len(counts) > 1:
            raise SettingsError("lanes that train together need equally many anomalous_prompts")
        (self._prompts,) = counts
        longest = int(self._lengths_T.max())
        self._contexts_TPLC = torch.zeros(
            len(self._lanes), self._prompts, longest, backbone.token_width, device=device
        )
        for context_PLC, lane, generator in zip(
            self._contexts_TPLC, self._lanes, self._generators, strict=True
        ):
            length = lane.settings.context_length
            drawn = torch.randn(self._prompts, length, backbone.token_width, generator=generator)
            context_PLC[:, :length] = backbone.token_std * drawn
        self._norm_T = self._contexts_TPLC.flatten(1).norm(dim=1)
        self._velocity_TPLC = torch.zeros_like(self._contexts_TPLC)
        self.meta_T2E = meta_features(backbone).expand(len(self._lanes), -1, -1).clone()
        self.steps_done = 0

    def contexts(self) -> list[torch.Tensor]:
        """The learned contexts, `(P, L, C)` with each lane's own length L."""
        return [
            context_PLC[:, : lane.settings.context_length].clone()
            for context_PLC, lane in zip(self._contexts_TPLC, self._lanes, strict=True)
        ]

    @torch.no_grad()
    def text_features(self) -> torch.Tensor:
        """The learned text features `(T, P, E)`, float32, L2-normalised."""
        return self._encode(self._contexts_TPLC)

    def advance(self, steps: int) -> None:
        """Take `steps` further steps on every lane; finished lanes stand still."""
        for _ in range(steps):
            self._step()
            self.steps_done += 1
            if self.steps_done % ROUND == 0:
                self._optimise_meta()

    def _step(self) -> None:
        tokens_TBNE, labels_TBN = self._draw_batch()
        contexts_TPLC = self._contexts_TPLC.requires_grad_(True)
        text_TPE = self._encode(contexts_TPLC)
        leaf_TPE = text_TPE.detach().requires_grad_(True)
        learned_TBNP = self._log_probabilities(tokens_TBNE, leaf_TPE)
        synthetic_T = synthetic_loss(learned_TBNP, labels_TBN) + self._penalties(
            tokens_TBNE, labels_TBN, leaf_TPE
        )
        # Each lane's loss depends on its own text features alone, so the gradient of the sum over
        # lanes holds every lane's own gradient; the text encoder is walked back once for each loss.
        (at_text_TPE,) = torch.autograd.grad(synthetic_T.sum(), leaf_TPE, retain_graph=True)
        is_guided = bool((self._smgs_weight_T > 0).any())
        (gradient_TPLC,) = torch.autograd.grad(
            text_TPE, contexts_TPLC, at_text_TPE, retain_graph=is_guided
        )
        if is_guided:
            with torch.no_grad():
                meta_TBN2 = self._log_probabilities(tokens_TBNE, self.meta_T2E)
            (at_text_TPE,) = torch.autograd.grad(
                divergence(meta_TBN2, learned_TBNP).sum(), leaf_TPE
            )
            (guide_TPLC,) = torch.autograd.grad(text_TPE, contexts_TPLC, at_text_TPE)
            gradient_TPLC = torch.where(
                self._is_penalty_T[:, None, None, None],
                gradient_TPLC + self._smgs_weight_T[:, None, None, None] * guide_TPLC,
                remove_conflict(gradient_TPLC, guide_TPLC, self._smgs_weight_T),
            )
        self._descend(gradient_TPLC)

    @torch.no_grad()
    def _descend(self, gradient_TPLC: torch.Tensor) -> None:
        self._contexts_TPLC.requires_grad_(False)
        length_T = gradient_TPLC.flatten(1).norm(dim=1).clamp_min(_TINY)
        unit_TPLC = gradient_TPLC / length_T[:, None, None, None]
        self._velocity_TPLC.mul_(_MOMENTUM).add_(unit_TPLC, alpha=1 - _MOMENTUM)
        progress_T = (self.steps_done / self._steps_T).clamp(max=1)
        decay_T = 0.5 * (1 + torch.cos(torch.pi * progress_T))
        rate_T = self._learning_rate_T * decay_T * self._norm_T
        self._contexts_TPLC -= rate_T[:, None, None, None] * self._velocity_TPLC

    @torch.no_grad()
    def _optimise_meta(self) -> None:
        """Let each lane's meta-prompt follow what it learned where guidance gets better."""
        moved_T2E = move_meta(self.meta_T2E, self.text_features())
        for position, lane in enumerate(self._lanes):
            if not lane.settings.self_optimising:
                continue
            guidance = lane.bank.guidance
            images = list(lane.images)
            tokens = guidance.tokens_FSDNE[:, images].to(self._backbone.device).float()
            labels_FX = guidance.labels_FSDN[:, images].to(self._backbone.device).flatten(1)
            before, after = (
                auroc(
                    anomalous_probability(
                        tokens, meta_2E[position], self._backbone.constants
                    ).flatten(1),
                    labels_FX,
                ).nanmean()
                for meta_2E in (self.meta_T2E, moved_T2E)
            )
            if after > before:
                self.meta_T2E[position] = moved_T2E[position]

    def _encode(self, contexts_TPLC: torch.Tensor) -> torch.Tensor:
        lengths_X = self._lengths_T.repeat_interleave(self._prompts)
        text_XE = self._backbone.encode_contexts(contexts_TPLC.flatten(0, 1), lengths_X)
        return text_XE.reshape(-1, self._prompts, text_XE.shape[-1])

    def _penalties(
        self, tokens_TBNE: torch.Tensor, labels_TBN: torch.Tensor, text_TPE: torch.Tensor
    ) -> torch.Tensor:
        """The weighted terms beside the synthetic loss, one value a lane."""
        penalty_T = torch.zeros_like(self._margin_T)
        if self._prompts > 2:
            penalty_T = penalty_T + self._diversity_T * likeness(text_TPE[:, 1:])
        if bool((self._margin_T > 0).any()):
            penalty_T = penalty_T + self._margin_T * margin(tokens_TBNE, labels_TBN, text_TPE)
        return penalty_T

    def _log_probabilities(self, tokens_TBNE: torch.Tensor, text_TPE: torch.Tensor) -> torch.Tensor:
        log_p_TXP = prompt_log_probabilities(
            tokens_TBNE.flatten(1, 2), text_TPE, self._backbone.constants
        )
        return log_p_TXP.reshape(*tokens_TBNE.shape[:3], -1)

    def _draw_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = [
            draw_batch(lane, generator)
            for lane, generator in zip(self._lanes, self._generators, strict=True)
        ]
        tokens, labels = zip(*drawn, strict=True)
        device = self._backbone.device
        return torch.stack(tokens).to(device).float(), torch.stack(labels).to(device)


def draw_batch(lane: Lane, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A lane's next images, noisy draws, then clean views: tokens `(B, N, E)` and labels
    `(B, N)`, 1 anomalous, 0 normal, -1 ignored."""
    bank = lane.bank
    settings = lane.settings
    noisy_SDNE = bank.noisy_SDNE[settings.noise_strength]
    images = torch.tensor(lane.images)
    image_B = images[torch.randint(len(images), (_NOISY + _CLEAN,), generator=g)]
    noisy_B, clean_B = image_B[:_NOISY], image_B[_NOISY:]
    draw_B = torch.randint(noisy_SDNE.shape[1], (_NOISY,), generator=g)
    view_B = torch.randint(bank.clean_SVNE.shape[1], (_CLEAN,), generator=g)
    clean_BNE = bank.clean_SVNE[clean_B, view_B]
    label_BN = bank.noisy_labels_SDN[noisy_B, draw_B]
    noisy_BNE = noisy_SDNE[noisy_B, draw_B]
    if settings.noise != "pixel":
        undisturbed_BNE = bank.clean_SVNE[noisy_B, bank.noisy_views_SD[noisy_B, draw_B]]
        on_tokens_BNE = add_token_noise(undisturbed_BNE, label_BN == 1, settings.noise_strength, g)
        by_turns_B = torch.arange(_NOISY) % 2 == 0
        is_token_B = by_turns_B if settings.noise == "mixed" else torch.ones_like(by_turns_B)
        noisy_BNE = torch.where(is_token_B[:, None, None], on_tokens_BNE, noisy_BNE)
    tokens_BNE = torch.cat([noisy_BNE, clean_BNE])
    return tokens_BNE, torch.cat([label_BN, label_BN.new_zeros(clean_BNE.shape[:2])])


def synthetic_loss(log_p_TBNP: torch.Tensor, labels_TBN: torch.Tensor) -> torch.Tensor:
    """The loss on self-generated anomalies, one value a lane.

    Patch level: focal loss (gamma 2) plus Dice on the anomalous probability. Image level:
    cross-entropy of the mean over the most anomalous 1 % of the patches. Labels of -1 are ignored.
    """
    p_TBN = log_p_TBNP[..., 1:].exp().sum(-1).clamp(1e-6, 1 - 1e-6)
    known_TBN = labels_TBN >= 0
    is_anomalous_TBN = labels_TBN == 1
    p_true_TBN = torch.where(is_anomalous_TBN, p_TBN, 1 - p_TBN)
    focal_TBN = -((1 - p_true_TBN) ** _FOCAL_GAMMA) * p_true_TBN.log()
    focal_T = _mean(focal_TBN, known_TBN)
    covered_T = (p_TBN * is_anomalous_TBN).sum((1, 2))
    total_T = (p_TBN * known_TBN).sum((1, 2)) + is_anomalous_TBN.sum((1, 2))
    dice_T = 1 - (2 * covered_T + 1) / (total_T + 1)
    worst_TB = top_mean(p_TBN)
    has_anomaly_TB = is_anomalous_TBN.any(-1)
    # An image whose only region is too small for any patch says neither normal nor anomalous.
    is_known_TB = has_anomaly_TB | (labels_TBN == 0).all(-1)
    image_TB = -torch.where(has_anomaly_TB, worst_TB, 1 - worst_TB).log()
    return focal_T + dice_T + _mean(image_TB, is_known_TB)


def divergence(meta_TBN2: torch.Tensor, learned_TBNP: torch.Tensor) -> torch.Tensor:
    """KL(p_meta || p_learned) of log-probabilities, averaged over the patches, one value a lane.

    Between normal and anomalous, whichever of the anomalous prompts it is.
    """
    learned_TBN2 = torch.stack([learned_TBNP[..., 0], learned_TBNP[..., 1:].logsumexp(-1)], dim=-1)
    return (meta_TBN2.exp() * (meta_TBN2 - learned_TBN2)).sum(-1).mean((1, 2))


def likeness(text_TAE: torch.Tensor) -> torch.Tensor:
    """Mean cosine of each two of a lane's prompts, one value a lane; features of unit length."""
    count = text_TAE.shape[1]
    cosine_TAA = text_TAE @ text_TAE.mT
    return (cosine_TAA.sum((1, 2)) - count) / (count * (count - 1))


def margin(
    tokens_TBNE: torch.Tensor, labels_TBN: torch.Tensor, text_TPE: torch.Tensor
) -> torch.Tensor:
    """How much farther good patches are from the normal prompt than from the middle of the
    anomalous ones, where they are; the explicit anomaly margin of PromptAD (arXiv 2404.05231), one
    value a lane."""
    anomalous_TE = F.normalize(text_TPE[:, 1:].mean(1), dim=-1)
    poles_T2E = torch.stack([text_TPE[:, 0], anomalous_TE], dim=1)
    cosine_TX2 = tokens_TBNE.flatten(1, 2) @ poles_T2E.mT
    distance_TX2 = (2 - 2 * cosine_TX2).clamp_min(_TINY).sqrt()
    excess_TX = (distance_TX2[..., 0] - distance_TX2[..., 1]).clamp_min(0)
    return _mean(excess_TX, labels_TBN.flatten(1) == 0)


def add_token_noise(
    tokens_BNE: torch.Tensor, chosen_BN: torch.Tensor, strength: float, g: torch.Generator
) -> torch.Tensor:
    """Chosen tokens of unit length plus noise of about `strength` times their length, again of
    unit length."""
    noise_BNE = torch.randn(tokens_BNE.shape, generator=g) / tokens_BNE.shape[-1] ** 0.5
    noisy_BNE = tokens_BNE + strength * chosen_BN[..., None] * noise_BNE
    return F.normalize(noisy_BNE, dim=-1).to(tokens_BNE.dtype)


def _mean(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Mean over the chosen values of each lane; 0 where none is chosen."""
    total_T = (values * chosen).flatten(1).sum(1)
    return total_T / chosen.flatten(1).sum(1).clamp_min(1)


def _check(lane: Lane, backbone: FrozenCLIP) -> None:
    if lane.settings.context_length > backbone.max_context_length:
        raise SettingsError(
            f"context_length {lane.settings.context_length} is too long for {backbone.spec.name}:"
            f" choose at most {backbone.max_context_length}"
        )
    if lane.settings.noise_strength not in lane.bank.noisy_SDNE:
        raise SettingsError(
            f"the anomaly bank holds no noise of strength {lane.settings.noise_strength}, only"
            f" {tuple(lane.bank.noisy_SDNE)}: encode the support set with it"
        )
    asked = (lane.settings.region, lane.settings.object_mask)
    held = (lane.bank.region, lane.bank.object_mask)
    if asked != held:
        raise SettingsError(
            f"the anomaly bank was encoded with (region, object_mask) = {held}, not {asked}:"
            f" encode the support set with these settings"
        )
