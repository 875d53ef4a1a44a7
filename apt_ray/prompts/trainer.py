"""PromptTrainer: many prompt sets, the lanes, trained together in one batch of the text encoder.

T lanes, P prompts (0 normal, the others anomalous), L longest context, C token width, B images a
step, N patch tokens, E joint width.
"""

from collections.abc import Collection, Iterable, Sequence

import torch
import torch.nn.functional as F

from apt_ray.auroc import auroc_of_rows
from apt_ray.detection.rule import anomalous_probability
from apt_ray.errors import SettingsError
from apt_ray.features.protocol import Backbone
from apt_ray.prompts.batches import draw_batches
from apt_ray.prompts.guidance import (
    ROUND,
    meta_features,
    move_meta,
    remove_conflict,
    state_contexts,
)
from apt_ray.prompts.lanes import Lane, LaneState
from apt_ray.prompts.losses import gradients_at_text, likeness, margin

_MOMENTUM = 0.9


_TINY = 1e-12


_LANES_PER_PASS = {"cpu": 16}
"""Lanes in one pass through the text encoder: more gain nothing on a CPU, and lanes of similar
length pad each other less. Elsewhere `_MOST_LANES_PER_PASS` bounds the memory of a pass."""


_MOST_LANES_PER_PASS = 256


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

    def __init__(self, backbone: Backbone, lanes: Sequence[Lane] = ()) -> None:
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
                auroc_of_rows(
                    anomalous_probability(tokens, meta_2E, self._backbone.constants).flatten(1),
                    labels_FX,
                ).nanmean()
                for meta_2E in (self.meta_T2E[row], moved_2E)
            )
            if after > before:
                self.meta_T2E[row] = moved_2E

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


def _initial_state(lane: Lane, backbone: Backbone, meta_2E: torch.Tensor) -> LaneState:
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


def _check(lane: Lane, backbone: Backbone) -> None:
    if lane.settings.context_length > backbone.max_context_length:
        raise SettingsError(
            f"context_length {lane.settings.context_length} is too long for {backbone.spec.name}:"
            f" choose at most {backbone.max_context_length}"
        )
    lane.bank.spec.check(lane.settings)
