"""PromptTrainer: many prompt sets, the lanes, trained together in one batch of the text encoder.

T lanes, P prompts (0 normal, the others anomalous), L longest context, C token width, B images a
step, N patch tokens, E joint width.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from apt_ray.backbone import FrozenCLIP
from apt_ray.bank import SupportBank
from apt_ray.config import FitSettings
from apt_ray.errors import SettingsError
from apt_ray.guidance import ROUND, meta_features, move_meta, remove_conflict, state_contexts
from apt_ray.models.builtin import BackboneConstants
from apt_ray.scoring import anomalous_probability, auroc, cosine_log_probabilities, top_mean

_NOISY, _CLEAN = 4, 4
_MOMENTUM = 0.9
_FOCAL_GAMMA = 2
_TINY = 1e-12

_LANES_PER_PASS = {"cpu": 16}
"""Lanes in one pass through the text encoder: more gain nothing on a CPU, and lanes of similar
length pad each other less. Elsewhere `_MOST_LANES_PER_PASS` bounds the memory of a pass."""

_MOST_LANES_PER_PASS = 256


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lane:
    """One prompt set in training, known to its trainer by identity.

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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LaneState:
    """All that a lane needs to go on elsewhere, on the CPU.

    Attributes:
        contexts_PLC: learned contexts, float32.
        velocity_PLC: the optimiser's momentum, float32.
        meta_2E: the meta-prompt, float32.
        norm: norm of the initial contexts, a scalar.
        generator: state of the lane's random generator, uint8.
        steps_done: steps taken so far.
    """

    contexts_PLC: torch.Tensor
    velocity_PLC: torch.Tensor
    meta_2E: torch.Tensor
    norm: torch.Tensor
    generator: torch.Tensor
    steps_done: int


class PromptTrainer:
    """Trains its lanes together; each comes out as if it had been trained alone.

    Lanes join and leave between steps, and each is at a step of its own schedule.

    The optimiser is gradient descent with momentum 0.9 on each lane's gradient at unit length,
    with cosine decay: a learning rate is the first step's length as a fraction of the contexts'
    norm, and so means the same for every backbone. Adam would rescale single coordinates and
    thereby undo SMGS.

    Attributes:
        lanes: those in training, in the order of joining: row T of every result.
        meta_T2E: each lane's meta-prompt, normal and anomalous.
    """

    def __init__(self, backbone: FrozenCLIP, lanes: Sequence[Lane] = ()) -> None:
        self._backbone = backbone
        self._start_2E = meta_features(backbone)
        self.lanes: tuple[Lane, ...] = ()
        self._generators: list[torch.Generator] = []
        self._steps_done: list[int] = []
        empty_TPLC = torch.zeros(0, 2, 1, backbone.token_width, device=backbone.device)
        self._contexts_TPLC, self._velocity_TPLC = empty_TPLC, empty_TPLC.clone()
        self._norm_T = empty_TPLC.flatten(1).norm(dim=1)
        self.meta_T2E = self._start_2E[None][:0]
        self._arrange()
        self.join(lanes)

    @property
    def steps_done(self) -> int:
        """Steps that every lane has taken."""
        return min(self._steps_done, default=0)

    def join(self, lanes: Sequence[Lane], states: Sequence[LaneState] | None = None) -> None:
        """Take further lanes in, at their start or where `states` say that they had come to.

        SettingsError, before anything has changed, if one of them does not suit the backbone.
        """
        for lane in lanes:
            _check(lane, self._backbone)
        if states is None:
            states = [_initial_state(lane, self._backbone, self._start_2E) for lane in lanes]
        if not lanes:
            return
        device = self._backbone.device
        shapes = [self._contexts_TPLC.shape[1:3], *(s.contexts_PLC.shape[:2] for s in states)]
        most, longest = (max(sizes) for sizes in zip(*shapes, strict=True))

        def grown(rows_TPLC: torch.Tensor, new: list[torch.Tensor]) -> torch.Tensor:
            padded = [_pad(tensor_PLC, most, longest) for tensor_PLC in new]
            return torch.cat([_pad(rows_TPLC, most, longest), torch.stack(padded).to(device)])

        self._contexts_TPLC = grown(self._contexts_TPLC, [s.contexts_PLC for s in states])
        self._velocity_TPLC = grown(self._velocity_TPLC, [s.velocity_PLC for s in states])
        self._norm_T = torch.cat([self._norm_T, torch.stack([s.norm for s in states]).to(device)])
        meta_T2E = torch.stack([s.meta_2E for s in states]).to(device)
        self.meta_T2E = torch.cat([self.meta_T2E, meta_T2E])
        self._generators += [_generator(state.generator) for state in states]
        self._steps_done += [s.steps_done for s in states]
        self.lanes += tuple(lanes)
        self._arrange()

    def leave(self, lanes: Collection[Lane]) -> list[LaneState]:
        """Let lanes go, in the order given; they can join again, here or elsewhere."""
        gone = [self.lanes.index(lane) for lane in lanes]
        contexts_TPLC, velocity_TPLC = self._contexts_TPLC.cpu(), self._velocity_TPLC.cpu()
        meta_T2E, norm_T = self.meta_T2E.cpu(), self._norm_T.cpu()
        states = []
        for position in gone:
            prompts, length = _shape(self.lanes[position])
            states.append(
                LaneState(
                    contexts_PLC=contexts_TPLC[position, :prompts, :length].clone(),
                    velocity_PLC=velocity_TPLC[position, :prompts, :length].clone(),
                    meta_2E=meta_T2E[position].clone(),
                    norm=norm_T[position].clone(),
                    generator=self._generators[position].get_state(),
                    steps_done=self._steps_done[position],
                )
            )
        kept = [position for position in range(len(self.lanes)) if position not in set(gone)]
        self.lanes = tuple(self.lanes[position] for position in kept)
        self._generators = [self._generators[position] for position in kept]
        self._steps_done = [self._steps_done[position] for position in kept]
        most, longest = self._largest(range(len(kept)))
        self._contexts_TPLC = self._contexts_TPLC[kept, :most, :longest]
        self._velocity_TPLC = self._velocity_TPLC[kept, :most, :longest]
        self._norm_T, self.meta_T2E = self._norm_T[kept], self.meta_T2E[kept]
        self._arrange()
        return states

    def contexts(self) -> list[torch.Tensor]:
        """The learned contexts, `(P, L, C)` with each lane's own length L."""
        shapes = [_shape(lane) for lane in self.lanes]
        return [
            context_PLC[:prompts, :length].clone()
            for context_PLC, (prompts, length) in zip(self._contexts_TPLC, shapes, strict=True)
        ]

    @torch.no_grad()
    def text_features(self, lanes: Collection[Lane] | None = None) -> torch.Tensor:
        """The learned text features `(T, P, E)` of some lanes, or all; float32, L2-normalised.

        These lanes have equally many prompts.
        """
        rows = range(len(self.lanes)) if lanes is None else [self.lanes.index(x) for x in lanes]
        return self._features(list(rows))

    def advance(self, steps: int) -> None:
        """Take `steps` further steps on every lane; finished lanes stand still."""
        for _ in range(steps):
            for rows in self._passes:
                self._step(rows)
            self._steps_done = [done + 1 for done in self._steps_done]
            for rows in self._passes:
                due = [row for row in rows if self._steps_done[row] % ROUND == 0]
                if due:
                    self._optimise_meta(due)

    def _arrange(self) -> None:
        """What follows from which lanes there are: their settings as tensors, and the passes."""
        settings, device = [lane.settings for lane in self.lanes], self._backbone.device
        self._lengths_T = torch.tensor(
            [s.context_length for s in settings], dtype=torch.long, device=device
        )
        self._smgs_weight_T = torch.tensor([s.smgs_weight for s in settings], device=device)
        self._learning_rate_T = torch.tensor([s.learning_rate for s in settings], device=device)
        self._steps_T = torch.tensor([s.steps for s in settings], device=device)
        self._is_penalty_T = torch.tensor([s.smgs == "penalty" for s in settings], device=device)
        self._diversity_T = torch.tensor([s.diversity_weight for s in settings], device=device)
        self._margin_T = torch.tensor([s.margin_weight for s in settings], device=device)
        # Lanes without SMGS need one walk back less, so they go together; then by length.
        order = sorted(
            range(len(settings)),
            key=lambda row: (settings[row].smgs_weight > 0, settings[row].context_length),
        )
        size = _LANES_PER_PASS.get(device.type, _MOST_LANES_PER_PASS)
        self._passes = []
        for count in sorted({s.anomalous_prompts for s in settings}):
            alike = [row for row in order if settings[row].anomalous_prompts == count]
            self._passes += [alike[start : start + size] for start in range(0, len(alike), size)]

    def _step(self, rows: list[int]) -> None:
        """One step of the lanes in `rows`, which share a pass through the text encoder."""
        tokens_TBNE, labels_TBN = self._draw_batch(rows)
        contexts_TPLC = self._contexts_of(rows).requires_grad_(True)
        text_TPE = self._encode(contexts_TPLC, self._lengths_T[rows])
        is_guided = any(self.lanes[row].settings.smgs_weight > 0 for row in rows)
        at_text_TPE, *at_text_of_guide = gradients_at_text(
            tokens_TBNE,
            labels_TBN,
            text_TPE.detach(),
            self.meta_T2E[rows] if is_guided else None,
            self._backbone.constants,
        )
        penalized_TPE = text_TPE.detach().requires_grad_(True)
        penalties = self._penalties(rows, tokens_TBNE, labels_TBN, penalized_TPE)
        if penalties is not None:
            at_text_TPE = at_text_TPE + torch.autograd.grad(penalties, penalized_TPE)[0]
        (gradient_TPLC,) = torch.autograd.grad(
            text_TPE, contexts_TPLC, at_text_TPE, retain_graph=is_guided
        )
        if is_guided:
            (guide_TPLC,) = torch.autograd.grad(text_TPE, contexts_TPLC, at_text_of_guide)
            weight_T = self._smgs_weight_T[rows]
            gradient_TPLC = torch.where(
                self._is_penalty_T[rows, None, None, None],
                gradient_TPLC + weight_T[:, None, None, None] * guide_TPLC,
                remove_conflict(gradient_TPLC, guide_TPLC, weight_T),
            )
        self._descend(rows, gradient_TPLC)

    @torch.no_grad()
    def _descend(self, rows: list[int], gradient_TPLC: torch.Tensor) -> None:
        length_T = gradient_TPLC.flatten(1).norm(dim=1).clamp_min(_TINY)
        unit_TPLC = gradient_TPLC / length_T[:, None, None, None]
        prompts, longest = gradient_TPLC.shape[1:3]
        velocity_TPLC = self._velocity_TPLC[rows, :prompts, :longest]
        velocity_TPLC = velocity_TPLC.mul_(_MOMENTUM).add_(unit_TPLC, alpha=1 - _MOMENTUM)
        done_T = torch.tensor([self._steps_done[row] for row in rows], device=length_T.device)
        progress_T = (done_T / self._steps_T[rows]).clamp(max=1)
        decay_T = 0.5 * (1 + torch.cos(torch.pi * progress_T))
        rate_T = self._learning_rate_T[rows] * decay_T * self._norm_T[rows]
        self._velocity_TPLC[rows, :prompts, :longest] = velocity_TPLC
        self._contexts_TPLC[rows, :prompts, :longest] -= rate_T[:, None, None, None] * velocity_TPLC

    @torch.no_grad()
    def _optimise_meta(self, rows: list[int]) -> None:
        """Let each lane's meta-prompt follow what it learned where guidance gets better."""
        rows = [row for row in rows if self.lanes[row].settings.self_optimising]
        if not rows:
            return
        moved_T2E = move_meta(self.meta_T2E[rows], self._features(rows))
        for row, moved_2E in zip(rows, moved_T2E, strict=True):
            lane = self.lanes[row]
            guidance = lane.bank.guidance
            images = list(lane.images)
            tokens = guidance.tokens_FSDNE[:, images].to(self._backbone.device).float()
            labels_FX = guidance.labels_FSDN[:, images].to(self._backbone.device).flatten(1)
            before, after = (
                auroc(
                    anomalous_probability(tokens, meta_2E, self._backbone.constants).flatten(1),
                    labels_FX,
                ).nanmean()
                for meta_2E in (self.meta_T2E[row], moved_2E)
            )
            self.meta_T2E[row] = torch.where(after > before, moved_2E, self.meta_T2E[row])

    def _largest(self, rows: Iterable[int]) -> tuple[int, int]:
        """Most prompts and longest context of the lanes in `rows`."""
        shapes = [_shape(self.lanes[row]) for row in rows] or [(2, 1)]
        most, longest = (max(sizes) for sizes in zip(*shapes, strict=True))
        return most, longest

    @torch.no_grad()
    def _features(self, rows: list[int]) -> torch.Tensor:
        """The text features `(T, P, E)` of the lanes in `rows`."""
        size = len(self._passes[0]) if self._passes else 1
        return torch.cat(
            [
                self._encode(self._contexts_of(some), self._lengths_T[some])
                for some in (rows[start : start + size] for start in range(0, len(rows), size))
            ]
        )

    def _contexts_of(self, rows: list[int]) -> torch.Tensor:
        prompts, longest = self._largest(rows)
        return self._contexts_TPLC[rows, :prompts, :longest]

    def _encode(self, contexts_TPLC: torch.Tensor, lengths_T: torch.Tensor) -> torch.Tensor:
        prompts = contexts_TPLC.shape[1]
        lengths_X = lengths_T.repeat_interleave(prompts)
        text_XE = self._backbone.encode_contexts(contexts_TPLC.flatten(0, 1), lengths_X)
        return text_XE.reshape(-1, prompts, text_XE.shape[-1])

    def _penalties(
        self,
        rows: list[int],
        tokens_TBNE: torch.Tensor,
        labels_TBN: torch.Tensor,
        text_TPE: torch.Tensor,
    ) -> torch.Tensor | None:
        """The weighted terms beside the synthetic loss, summed over the lanes; None if no lane has
        any."""
        terms = []
        if text_TPE.shape[1] > 2:
            terms.append(self._diversity_T[rows] * likeness(text_TPE[:, 1:]))
        if any(self.lanes[row].settings.margin_weight > 0 for row in rows):
            terms.append(self._margin_T[rows] * margin(tokens_TBNE, labels_TBN, text_TPE))
        return torch.stack(terms).sum() if terms else None

    def _draw_batch(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return draw_batches(
            [self.lanes[row] for row in rows],
            [self._generators[row] for row in rows],
            self._backbone.device,
        )


def draw_batches(
    lanes: Sequence[Lane], generators: Sequence[torch.Generator], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each lane's next images, noisy draws, then clean views: tokens `(T, B, N, E)`, float32, and
    labels `(T, B, N)`, 1 anomalous, 0 normal, -1 ignored.

    Lanes that read the same tensors are copied together: on a GPU a copy for each lane would cost
    more than all of the step's arithmetic.
    """
    draws = [_draw(lane, g) for lane, g in zip(lanes, generators, strict=True)]
    clean_SVNE, labels_SDN = lanes[0].bank.clean_SVNE, lanes[0].bank.noisy_labels_SDN
    shape_TBNE = (len(lanes), _NOISY + _CLEAN, *clean_SVNE.shape[2:])
    tokens_TBNE = clean_SVNE.new_empty(shape_TBNE, device=device)
    labels_TBN = labels_SDN.new_zeros(shape_TBNE[:3], device=device)
    readers: dict[tuple[int, float], list[int]] = {}
    for number, lane in enumerate(lanes):
        readers.setdefault((id(lane.bank), lane.settings.noise_strength), []).append(number)
    for (_, strength), numbers in readers.items():
        bank = lanes[numbers[0]].bank
        noisy_GB = torch.stack([draws[number].noisy_B for number in numbers])
        clean_GB = torch.stack([draws[number].clean_B for number in numbers])
        at_G = torch.tensor(numbers, device=device)
        tokens_TBNE[at_G, :_NOISY] = _rows(bank.noisy_SDNE[strength], noisy_GB).to(device)
        tokens_TBNE[at_G, _NOISY:] = _rows(bank.clean_SVNE, clean_GB).to(device)
        labels_TBN[at_G, :_NOISY] = _rows(bank.noisy_labels_SDN, noisy_GB).to(device)
    for number, (lane, g) in enumerate(zip(lanes, generators, strict=True)):
        if lane.settings.noise != "pixel":
            _disturb_tokens(lane, draws[number], g, tokens_TBNE[number], labels_TBN[number])
    return tokens_TBNE.float(), labels_TBN


@dataclass(frozen=True, slots=True)
class _Draw:
    """Which of the bank's noisy draws and clean views, counted over all of its images."""

    noisy_B: torch.Tensor
    clean_B: torch.Tensor


def _draw(lane: Lane, g: torch.Generator) -> _Draw:
    bank, images = lane.bank, torch.tensor(lane.images)
    draws, views = bank.noisy_labels_SDN.shape[1], bank.clean_SVNE.shape[1]
    image_B = images[torch.randint(len(images), (_NOISY + _CLEAN,), generator=g)]
    return _Draw(
        noisy_B=image_B[:_NOISY] * draws + torch.randint(draws, (_NOISY,), generator=g),
        clean_B=image_B[_NOISY:] * views + torch.randint(views, (_CLEAN,), generator=g),
    )


def _disturb_tokens(
    lane: Lane,
    draw: _Draw,
    g: torch.Generator,
    tokens_BNE: torch.Tensor,
    labels_BN: torch.Tensor,
) -> None:
    """Put noise on tokens in place of noisy pixels: of all noisy draws, or of every other one."""
    bank, settings = lane.bank, lane.settings
    views = bank.clean_SVNE.shape[1]
    view_B = _rows(bank.noisy_views_SD, draw.noisy_B).cpu()
    image_B = draw.noisy_B // bank.noisy_labels_SDN.shape[1]
    undisturbed_BNE = _rows(bank.clean_SVNE, image_B * views + view_B).to(tokens_BNE.device)
    is_chosen_BN = labels_BN[:_NOISY] == 1
    on_tokens_BNE = add_token_noise(undisturbed_BNE, is_chosen_BN, settings.noise_strength, g)
    step = 2 if settings.noise == "mixed" else 1
    tokens_BNE[:_NOISY:step] = on_tokens_BNE[::step]


def _rows(values_SX: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Rows of the tensor whose first two axes are one, `(*row.shape, ...)`; whole rows are copied,
    not one number after another."""
    flat = values_SX.flatten(0, 1)
    picked: torch.Tensor = flat.index_select(0, row.flatten().to(flat.device))
    return picked.reshape(*row.shape, *flat.shape[1:])


def gradients_at_text(
    tokens_TBNE: torch.Tensor,
    labels_TBN: torch.Tensor,
    text_TPE: torch.Tensor,
    meta_T2E: torch.Tensor | None,
    constants: BackboneConstants,
) -> tuple[torch.Tensor, ...]:
    """Gradients `(T, P, E)` to the text features: of `synthetic_loss`, and with a meta-prompt of
    the `divergence` from it.

    Each lane's loss depends on its own text features alone, so the gradient of the sum over lanes
    holds every lane's own gradient. The tokens, by far the largest tensor, are read once for all
    cosines and once for all gradients.
    """
    prompts, tokens_TXE = text_TPE.shape[1], tokens_TBNE.flatten(1, 2)
    known_TQE = text_TPE if meta_T2E is None else torch.cat([text_TPE, meta_T2E], dim=1)
    cosine_TQX = known_TQE @ tokens_TXE.mT
    learned_TPX = cosine_TQX[:, :prompts].requires_grad_(True)

    def by_image(cosine_TPX: torch.Tensor) -> torch.Tensor:
        log_p_TXP = cosine_log_probabilities(cosine_TPX, constants)
        return log_p_TXP.reshape(*tokens_TBNE.shape[:3], -1)

    log_p_TBNP = by_image(learned_TPX)
    losses = [synthetic_loss(log_p_TBNP, labels_TBN)]
    if meta_T2E is not None:
        losses.append(divergence(by_image(cosine_TQX[:, prompts:]), log_p_TBNP))
    at_cosine = [
        torch.autograd.grad(loss_T.sum(), learned_TPX, retain_graph=True)[0] for loss_T in losses
    ]
    return (torch.cat(at_cosine, dim=1) @ tokens_TXE).chunk(len(losses), dim=1)


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
    noise_BNE = torch.randn(tokens_BNE.shape, generator=g).to(tokens_BNE.device)
    noise_BNE = noise_BNE / tokens_BNE.shape[-1] ** 0.5
    noisy_BNE = tokens_BNE + strength * chosen_BN[..., None] * noise_BNE
    return F.normalize(noisy_BNE, dim=-1).to(tokens_BNE.dtype)


def _initial_state(lane: Lane, backbone: FrozenCLIP, meta_2E: torch.Tensor) -> LaneState:
    generator = torch.Generator().manual_seed(lane.seed)
    shape = (*_shape(lane), backbone.token_width)
    contexts_PLC = backbone.token_std * torch.randn(shape, generator=generator)
    if lane.settings.start == "states":
        contexts_PLC = state_contexts(backbone, *_shape(lane)).cpu()
    return LaneState(
        contexts_PLC=contexts_PLC,
        velocity_PLC=torch.zeros_like(contexts_PLC),
        meta_2E=meta_2E,
        norm=contexts_PLC.norm(),
        generator=generator.get_state(),
        steps_done=0,
    )


def _generator(state: torch.Tensor) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(state.clone())  # torch reads it as a struct, which must be aligned
    return generator


def _shape(lane: Lane) -> tuple[int, int]:
    """Prompts of a lane, and the length of their contexts."""
    return 1 + lane.settings.anomalous_prompts, lane.settings.context_length


def _pad(values_PLC: torch.Tensor, prompts: int, length: int) -> torch.Tensor:
    """Zeros behind the contexts up to `length`, and behind the prompts up to `prompts`."""
    missing = (length - values_PLC.shape[-2], prompts - values_PLC.shape[-3])
    return F.pad(values_PLC, (0, 0, 0, missing[0], 0, missing[1]))


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
