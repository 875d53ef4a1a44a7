"""The pretraining run: seeded, resumable, and repeatable where it is counted in steps.

Everything random in a step follows from the seed and the step's number, so a checkpoint is the
weights, the optimiser and the number of steps.

Shapes: P pairs, N patch tokens, E joint width, K phrases, L tokens, C text width.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_ray.errors import SettingsError
from apt_ray.features.builtin.apt_mini import build_model, build_tokenizer, load_builtin
from apt_ray.features.constants import BackboneConstants
from apt_ray.files import writing
from apt_ray.pretraining import losses
from apt_ray.pretraining.captions import Phrase, Vocabulary, draw_phrases, draw_states, holds
from apt_ray.pretraining.features import (
    REFERENCE_BLOCKS,
    VisionFeatures,
    encode_images,
    encode_texts,
    position_embedding,
)
from apt_ray.pretraining.generator import Attribute, Pairs, generate
from apt_ray.pretraining.settings import TrainSettings
from apt_ray.pretraining.surfaces import TRAINING_SURFACES

if TYPE_CHECKING:
    from open_clip import CLIP

HEAD_BLOCKS = (1, 3, 5)
_WHITENING_IMAGES = 256
_BYTES_A_PIXEL = 500
"""Memory that drawing a pair needs at its peak, for each of its pixels."""
_CHECKPOINT = "checkpoint.pt"
_CURVE = "curve.jsonl"


class Scales(nn.Module):
    """Scales and biases that turn cosines into logits, each learned at `scale_rate`."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Parameter(torch.tensor([math.log(10.0), 0.0]))
        self.image = nn.Parameter(torch.tensor([math.log(10.0), 0.0]))
        self.phrase = nn.Parameter(torch.tensor([math.log(10.0), -2.0]))
        self.reference = nn.Parameter(torch.tensor([math.log(10.0), -2.0]))
        self.pooled_dense = nn.Parameter(torch.tensor([math.log(10.0), 0.0]))
        self.pooled_reference = nn.Parameter(torch.tensor([math.log(10.0), -2.0]))

    def start_from(self, constants: BackboneConstants) -> None:
        """Take the scales of a trained backbone; the biases follow within some steps."""
        for scale_2, value in (
            (self.dense, constants.dense_scale),
            (self.pooled_dense, constants.dense_scale),
            (self.reference, constants.reference_scale),
            (self.pooled_reference, constants.reference_scale),
        ):
            scale_2.data[0] = math.log(value)

    @staticmethod
    def logits(scale_2: Tensor, similarity: Tensor) -> Tensor:
        """The similarity times the (exponentiated) scale plus the bias."""
        return scale_2[0].clamp(max=math.log(100.0)).exp() * similarity + scale_2[1]


class Pretraining:
    """One run: `step` trains on one batch, `save` and `resume` carry it across processes."""

    def __init__(self, settings: TrainSettings, device: str = "cpu") -> None:
        for name in settings.left_out:
            if name not in TRAINING_SURFACES:
                raise SettingsError(
                    f"no kind of surface is called {name!r}: they are"
                    f" {', '.join(TRAINING_SURFACES)}"
                )
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.surfaces = [name for name in TRAINING_SURFACES if name not in settings.left_out]
        self.device = torch.device(device)
        self.scales = Scales()
        if settings.start == "shipped":
            shipped = load_builtin()
            self.model = shipped.model.train().requires_grad_(True).to(self.device)
            self.scales.start_from(shipped.constants)
        else:
            self.model = build_model().to(self.device)
        self.scales.to(self.device)
        width = self.model.visual.conv1.out_channels
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in HEAD_BLOCKS).to(self.device)
        tokenizer = build_tokenizer()
        self.vocabulary = Vocabulary(
            tokenizer.encode, tokenizer.sot_token_id, tokenizer.eot_token_id
        )
        self._trained_ids = torch.tensor(self.vocabulary.all_ids(), device=self.device)
        self._row_of_id = torch.zeros(self.model.vocab_size, dtype=torch.int64, device=self.device)
        self._row_of_id[self._trained_ids] = torch.arange(
            len(self._trained_ids), device=self.device
        )
        # Only these rows are trained and shipped; a table of its own keeps the step small.
        table = self.model.token_embedding.weight.detach()[self._trained_ids]
        self.token_table = nn.Parameter(table.clone())
        self.model.token_embedding.weight.requires_grad_(False)
        if settings.start == "scratch":
            seeds_P = self._seeds(-1, _WHITENING_IMAGES)
            _whiten_patches(self.model, seeds_P, settings.sizes[0.0])
        self.optimizer = self._build_optimizer()
        self.steps_done = 0
        self.seconds = 0.0
        self._pixels_a_draw = _pixels_a_draw(self.device)
        self._drawn: dict[tuple[int, int, int], Pairs] = {}

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        done = self.steps_done / self.settings.steps if self.settings.steps else 0.0
        spent = self.seconds / (60 * self.settings.minutes) if self.settings.minutes else 0.0
        return min(max(done, spent), 1.0)

    def step(self) -> dict[str, float]:
        """Train on one batch; returns the terms of the loss."""
        started = time.perf_counter()
        settings = self.settings
        size = settings.sizes[max(share for share in settings.sizes if share <= self.progress)]
        count = max(2, round(settings.batch_pairs * (settings.sizes[0.0] / size) ** 2))
        pairs = self._draw(size, count)
        terms, weights = self._losses(pairs), self._weights()
        loss = sum((weights[name] * term for name, term in terms.items()), torch.zeros(()))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._schedule()
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        self.optimizer.step()
        self.steps_done += 1
        self.seconds += time.perf_counter() - started
        return {"loss": loss.item()} | {name: term.item() for name, term in terms.items()}

    def trained_model(self) -> CLIP:
        """The model with the trained rows in its token table."""
        self.model.token_embedding.weight.data[self._trained_ids] = self.token_table.detach()
        return self.model

    @property
    def trained_ids(self) -> list[int]:
        """Rows of the token table that the captions train."""
        ids: list[int] = self._trained_ids.tolist()
        return ids

    def save(self, folder: Path) -> None:
        """Write the checkpoint, replacing an older one only when it is complete."""
        with writing(folder / _CHECKPOINT) as place:
            torch.save(self._state(), place)

    def resume(self, folder: Path) -> bool:
        """Go on from the checkpoint in `folder`; False if there is none."""
        path = folder / _CHECKPOINT
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["settings"] != self.settings.model_dump():
            raise SettingsError(
                f"{path} belongs to a run of other settings: give those, or another folder"
            )
        self._modules().load_state_dict(state["modules"])
        self.token_table.data.copy_(state["token_table"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_done, self.seconds = state["steps_done"], state["seconds"]
        return True

    def _state(self) -> dict[str, Any]:
        return {
            "settings": self.settings.model_dump(),
            "modules": self._modules().state_dict(),
            "token_table": self.token_table.detach(),
            "optimizer": self.optimizer.state_dict(),
            "steps_done": self.steps_done,
            "seconds": self.seconds,
        }

    def _modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"model": self.model, "scales": self.scales, "heads": self.heads})

    def _build_optimizer(self) -> torch.optim.Optimizer:
        decayed: list[Tensor] = []
        plain: list[Tensor] = [self.token_table]
        for name, parameter in [*self.model.named_parameters(), *self.heads.named_parameters()]:
            if parameter.requires_grad and name != "logit_scale":
                is_matrix = parameter.ndim >= 2 and "positional" not in name
                (decayed if is_matrix else plain).append(parameter)
        rate, settings = self.settings.learning_rate, self.settings
        return torch.optim.AdamW(
            [
                {"params": decayed, "peak": rate, "weight_decay": settings.weight_decay},
                {"params": plain, "peak": rate, "weight_decay": 0.0},
                {
                    "params": [*self.scales.parameters(), self.model.logit_scale],
                    "peak": rate * settings.scale_rate,
                    "weight_decay": 0.0,
                },
            ],
            lr=rate,
            betas=(0.9, 0.98),
            fused=True,
        )

    def _schedule(self) -> float:
        warmup = min(1.0, (self.steps_done + 1) / self.settings.warmup_steps)
        return warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.progress)))

    def _draw(self, size: int, count: int) -> Pairs:
        """The next step's pairs, which are the same however many steps are drawn at once."""
        key = (self.steps_done, size, count)
        if key not in self._drawn:
            ahead = max(1, self._pixels_a_draw // (count * size**2))
            steps = range(self.steps_done, self.steps_done + ahead)
            seeds_P = torch.cat([self._seeds(step, count) for step in steps])
            pairs = generate(seeds_P, size=size, surfaces=self.surfaces)
            self._drawn = {
                (step, size, count): part
                for step, part in zip(steps, pairs.split(count), strict=True)
            }
        return self._drawn.pop(key)

    def _seeds(self, step: int, count: int) -> Tensor:
        first = _number(self.settings.seed, step, "images")
        return first + torch.arange(count, device=self.device)

    def _weights(self) -> dict[str, float]:
        settings = self.settings
        return {
            "dense": settings.dense_weight,
            "reference": settings.reference_weight,
            "heads": settings.head_weight,
            "image": settings.image_weight,
            "pooled": settings.pooled_weight,
            "phrases": settings.phrase_weight,
            "contrast": settings.contrast_weight,
            "spread": settings.spread_weight,
        }

    def _losses(self, pairs: Pairs) -> dict[str, Tensor]:
        settings, scales = self.settings, self.scales
        rng = random.Random(_number(settings.seed, self.steps_done, "texts"))
        count = len(pairs.mask_PHW)
        with self._autocast():
            vision = self._encode_pairs(pairs, rng)
        query_labels_PN = losses.known_labels(pairs.mask_PHW, self.model.visual.patch_size[0])
        labels_BN = torch.cat((torch.zeros_like(query_labels_PN), query_labels_PN))
        is_anomalous_B = labels_BN.nan_to_num(1).amax(1)

        phrases = draw_phrases(rng, pairs.attributes_PA, settings.phrases)
        states = settings.state_phrases
        texts = draw_states(rng, states, anomalous=False) + draw_states(rng, states, anomalous=True)
        with self._autocast():
            text_KE = self._encode_texts([*texts, *(phrase.text for phrase in phrases)], rng)
            free_KE = self._encode_free_texts(rng)
        state_KE, phrase_KE = text_KE[: 2 * states], text_KE[2 * states :]

        direction_BE = _state_directions(state_KE, 2 * count)
        similarity_BN = (vision.tokens_BNE * direction_BE[:, None]).sum(-1)
        image_similarity_B1 = (vision.image_BE * direction_BE).sum(-1, keepdim=True)
        distance_PN = losses.reference_distance(
            [vision.block_tokens_BNW[block][count:] for block in REFERENCE_BLOCKS],
            [vision.block_tokens_BNW[block][:count] for block in REFERENCE_BLOCKS],
        )
        head_losses = [
            losses.balanced_bce(head(F.layer_norm(tokens, tokens.shape[-1:]))[..., 0], labels_BN)
            for head, tokens in (
                (head, vision.block_tokens_BNW[block])
                for head, block in zip(self.heads, HEAD_BLOCKS, strict=True)
            )
        ]
        phrase_loss, contrast_loss = self._phrase_losses(
            pairs, vision, query_labels_PN, phrases, phrase_KE
        )
        sampled = vision.tokens_BNE.flatten(0, 1)
        return {
            "dense": losses.balanced_bce(
                scales.logits(scales.dense, similarity_BN), labels_BN, focus=settings.focus
            ),
            "reference": losses.balanced_bce(
                scales.logits(scales.reference, distance_PN),
                query_labels_PN,
                focus=settings.focus,
            ),
            "heads": torch.stack(head_losses).mean(),
            "image": F.binary_cross_entropy_with_logits(
                scales.logits(scales.image, image_similarity_B1)[:, 0], is_anomalous_B
            ),
            "pooled": 0.5
            * (
                F.binary_cross_entropy_with_logits(
                    scales.logits(scales.pooled_dense, losses.top_mean(similarity_BN)),
                    is_anomalous_B,
                )
                + F.binary_cross_entropy_with_logits(
                    scales.logits(scales.pooled_reference, losses.top_mean(distance_PN)),
                    is_anomalous_B[count:],
                )
            ),
            "phrases": phrase_loss,
            "contrast": contrast_loss,
            "spread": 1 / losses.participation_ratio(sampled)
            + 0.5 / losses.participation_ratio(torch.cat((phrase_KE, free_KE))),
        }

    def _encode_pairs(self, pairs: Pairs, rng: random.Random) -> VisionFeatures:
        """References, then queries; the window of the position grid moves, and at times is half
        as wide, so that the model bears other sizes."""
        side = self.model.visual.grid_size[0]
        cells = pairs.mask_PHW.shape[-1] // self.model.visual.patch_size[0]
        span = cells // 2 if rng.random() < 0.2 else min(cells, side)
        position_NW = position_embedding(
            self.model,
            cells,
            row=rng.randint(0, side - span),
            column=rng.randint(0, side - span),
            span=span,
        )
        images_B3HW = torch.cat((pairs.reference_P3HW, pairs.query_P3HW))
        blocks = {*REFERENCE_BLOCKS, *HEAD_BLOCKS}
        return encode_images(self.model, images_B3HW, position_NW, sorted(blocks))

    def _encode_texts(self, texts: list[str], rng: random.Random) -> Tensor:
        tokens_KL = self.vocabulary.tokens(texts).to(self.device)
        embedded_KLC = self.token_table[self._row_of_id[tokens_KL]]
        jitter = self._noise(embedded_KLC.shape, rng)
        # Every other text is clean, so that the words themselves stay exact.
        jitter[::2] = 0
        return encode_texts(
            self.model, embedded_KLC + self.settings.token_jitter * jitter, tokens_KL.argmax(1)
        )

    def _encode_free_texts(self, rng: random.Random) -> Tensor:
        """Features of random contexts between start and end, as prompt tuning begins with."""
        length = rng.randint(2, 12)
        free_KLC = self._noise((self.settings.free_texts, length, self.token_table.shape[1]), rng)
        start, end = self.token_table[self._row_of_id[self._trained_ids[-2:]]]
        shape = (self.settings.free_texts, 1, -1)
        embedded_KLC = torch.cat((start.expand(shape), free_KLC, end.expand(shape)), dim=1)
        ends_K = torch.full((len(free_KLC),), length + 1, device=self.device)
        return encode_texts(self.model, embedded_KLC, ends_K)

    def _autocast(self) -> torch.autocast:
        enabled = self.settings.bfloat16
        if enabled is None:
            # Without AVX-512 a product of bfloat16 matrices takes fifty times as long.
            capability = torch.backends.cpu.get_cpu_capability()
            enabled = self.device.type != "cpu" or capability.startswith("AVX512")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _noise(self, shape: tuple[int, ...], rng: random.Random) -> Tensor:
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        noise = torch.randn(shape, generator=generator).to(self.device)
        return noise * self.token_table.detach().std()

    def _phrase_losses(
        self,
        pairs: Pairs,
        vision: VisionFeatures,
        labels_PN: Tensor,
        phrases: list[Phrase],
        phrase_KE: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Phrases against every query patch, and against pictures and their defective regions."""
        count, attributes_PA = len(labels_PN), pairs.attributes_PA
        normal_PA = attributes_PA.clone()
        normal_PA[:, Attribute.STATE :] = 0
        true_if_anomalous = holds(phrases, attributes_PA)
        true_if_normal = holds(phrases, normal_PA)
        tokens_PNE = vision.tokens_BNE[count:]
        is_true_PNK = torch.where(
            (labels_PN == 1)[..., None], true_if_anomalous[:, None], true_if_normal[:, None]
        )
        known = ~labels_PN.isnan()
        similarity_XK = tokens_PNE[known] @ phrase_KE.T
        phrase_loss = losses.multi_label_bce(
            Scales.logits(self.scales.phrase, similarity_XK), is_true_PNK[known]
        )
        weight_PN1 = (labels_PN == 1).float()[..., None]
        region_PE = F.normalize((tokens_PNE * weight_PN1).sum(1), dim=-1)
        rows_XE = torch.cat((vision.image_BE, region_PE))
        is_true_XK = torch.cat(
            (true_if_normal, true_if_anomalous, true_if_anomalous & (weight_PN1.sum(1) > 0))
        )
        logits_XK = self.model.logit_scale.clamp(max=math.log(100.0)).exp() * rows_XE @ phrase_KE.T
        return phrase_loss, losses.multi_positive_contrast(logits_XK, is_true_XK)


def train(
    settings: TrainSettings, folder: Path, *, device: str = "cpu", report: Callable[[str], None]
) -> Pretraining:
    """Train to the end, going on from a checkpoint in `folder`, which is renewed once a minute.

    `folder/curve.jsonl` keeps the terms of the loss, a line about every ten seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    run = Pretraining(settings, device)
    if run.resume(folder):
        report(f"resumed after {run.steps_done} steps")
    saved = reported = time.perf_counter()
    while run.progress < 1:
        terms = run.step()
        now = time.perf_counter()
        if now - reported > 10 or run.progress >= 1:
            line = {"progress": run.progress, "step": run.steps_done, **terms}
            with (folder / _CURVE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            parts = " ".join(f"{name} {value:.3f}" for name, value in terms.items())
            report(f"{run.progress:6.1%}  step {run.steps_done}  {parts}")
            reported = now
        if now - saved > 60:
            run.save(folder)
            saved = now
    run.save(folder)
    return run


def _state_directions(state_KE: Tensor, count: int) -> Tensor:
    """(count, E) anomalous minus normal text: single phrases for half of the rows, so that every
    wording works, and the mean of all phrases for the others."""
    normal_KE, anomalous_KE = state_KE.chunk(2)
    pairs_KE = anomalous_KE - normal_KE
    mean_E = F.normalize(anomalous_KE.mean(0), dim=0) - F.normalize(normal_KE.mean(0), dim=0)
    row = torch.arange(count, device=state_KE.device)
    return torch.where((row % 2 == 0)[:, None], pairs_KE[row // 2 % len(pairs_KE)], mean_E)


def _pixels_a_draw(device: torch.device) -> int:
    """How many pixels of pairs to draw at once, 0 for as few as a step needs.

    Drawing launches tens of thousands of small kernels however many pairs it draws, so a GPU draws
    many steps' pairs at once, in a third of its memory.
    """
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free // 3 // _BYTES_A_PIXEL


def _whiten_patches(model: CLIP, seeds_P: Tensor, size: int) -> None:
    """Let the patch embedding start as the whitening of generated patches."""
    conv = model.visual.conv1
    pairs = generate(seeds_P, size=size)
    mean, std = (
        torch.tensor(values, device=seeds_P.device)[:, None, None]
        for values in (model.visual.image_mean, model.visual.image_std)
    )
    patch = conv.kernel_size[0]
    rows = F.unfold((pairs.query_P3HW - mean) / std, patch, stride=patch).transpose(1, 2)
    rows = rows.flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    components = (vectors / (values + 0.01 * values.mean()).sqrt()).T.flip(0)[: conv.out_channels]
    conv.weight.data.copy_(components.float().reshape(conv.weight.shape))


def _number(seed: int, step: int, purpose: str) -> int:
    digest = hashlib.sha256(f"{seed} {step} {purpose}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
