"""PromptAD (Li et al., CVPR 2024): prompts learned from normal images alone.

As in its official code for segmentation: 4 shared context vectors before the name of the product,
anomalous prompts both written (a state beside the name) and learned (one more vector), the logit
scale without exponentiation, a loss of three parts, SGD 0.002 with momentum 0.9, weight decay and
cosine over 100 steps, and the map 1 / (1 / text + 1 / memory). Not as there: the last step is
taken, not the best one on the test images; states are general, since those of a product are not
known; patches are those of the backbone that all methods share; and the memory is the nearest
support patch of `benchmarks.baselines.memory`, on whose grid the text's map is enlarged.

T texts, L positions, C token width, N patch tokens, E joint width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_ray.detection.rule import enlarge
from apt_ray.features.clip import FrozenCLIP
from benchmarks.baselines.memory import nearest
from benchmarks.baselines.support import Encoded, ImageRule, Support

STATES = (
    "damaged {}",
    "flawed {}",
    "abnormal {}",
    "imperfect {}",
    "blemished {}",
    "{} with flaw",
    "{} with defect",
    "{} with damage",
)
_CONTEXT, _LEARNED = 4, 4
_INITIAL_STD = 0.02
_STEPS, _RATE, _LAST_RATE, _MOMENTUM, _DECAY = 100, 0.002, 1e-5, 0.9, 5e-4
_ALIGNMENT_WEIGHT = 0.001


class Prompts:
    """The normal prompt and the anomalous ones; the contexts are what is learned.

    Attributes:
        contexts: the normal context `(4, C)` and the anomalous ones `(4, 1, C)`.
    """

    def __init__(self, backbone: FrozenCLIP, name: str, seed: int) -> None:
        self._backbone = backbone
        self._name_LC = backbone.embed_words(f"{name}.")
        self._states = [backbone.embed_words(f"{state.format(name)}.") for state in STATES]
        g = torch.Generator().manual_seed(seed)
        self.contexts = [
            (_INITIAL_STD * torch.randn(*shape, backbone.token_width, generator=g))
            .to(backbone.device)
            .requires_grad_()
            for shape in ((_CONTEXT,), (_LEARNED, 1))
        ]

    def encode(self) -> tuple[Tensor, Tensor, Tensor]:
        """Text features: normal `(1, E)`, written anomalous, learned anomalous; L2-normalised."""
        normal_LC, learned_T1C = self.contexts
        written = [torch.cat([normal_LC, state_LC]) for state_LC in self._states]
        learned = [torch.cat([normal_LC, own_1C, self._name_LC]) for own_1C in learned_T1C]
        texts = [torch.cat([normal_LC, self._name_LC]), *written, *learned]
        lengths_T = torch.tensor([len(text) for text in texts])
        padded_TLC = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        features_TE = self._backbone.encode_contexts(padded_TLC, lengths_T)
        return features_TE[:1], features_TE[1 : 1 + len(written)], features_TE[1 + len(written) :]


def fit(support: Support) -> dict[str, ImageRule]:
    """Learn the prompts; fuse with the memory of the support patches."""
    scale = math.log(support.backbone.constants.dense_scale)
    text_PE = learn(support, scale)
    memory, grid = nearest(support.features), support.backbone.grid

    def alone(encoded: Encoded) -> Tensor:
        return (scale * encoded.features.tokens_BNE @ text_PE.T).softmax(-1)[..., 1]

    def fused(encoded: Encoded) -> Tensor:
        memory_BF = memory(encoded)
        side = math.isqrt(memory_BF.shape[1])
        return parallel(enlarge(alone(encoded), grid, (side, side)), memory_BF)

    return {"promptad": support.by_patches(fused), "promptad-alone": support.by_patches(alone)}


def learn(support: Support, scale: float) -> Tensor:
    """The learned normal and anomalous text features `(2, E)`, L2-normalised."""
    name = support.category.replace("_", " ")
    prompts = Prompts(support.backbone, name, support.seed)
    optimizer = torch.optim.SGD(prompts.contexts, lr=_RATE, momentum=_MOMENTUM, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS, eta_min=_LAST_RATE)
    tokens_NE = support.features.tokens_BNE.flatten(0, 1)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        loss(tokens_NE, *prompts.encode(), scale=scale).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        normal_1E, written_TE, learned_TE = prompts.encode()
        return torch.cat([normal_1E, mean_direction(torch.cat([written_TE, learned_TE]))])


def loss(
    tokens_NE: Tensor, normal_1E: Tensor, written_TE: Tensor, learned_TE: Tensor, *, scale: float
) -> Tensor:
    """Cross-entropy of normal patches against all anomalous prompts, plus the margin that keeps
    them nearer to the normal prompt than to the mean anomalous one, plus the alignment of learned
    with written anomalous prompts (equations 4, 6 and 5 of the paper)."""
    anomalous_TE = torch.cat([written_TE, learned_TE])
    logits_NT = scale * tokens_NE @ torch.cat([normal_1E, anomalous_TE]).T
    contrast = -F.log_softmax(logits_NT, -1)[:, 0].mean()
    to_normal_N = (tokens_NE - normal_1E).square().sum(-1)
    to_anomalous_N = (tokens_NE - mean_direction(anomalous_TE)).square().sum(-1)
    margin = F.relu(to_normal_N - to_anomalous_N).mean()
    alignment = (written_TE.mean(0) - learned_TE.mean(0)).square().sum()
    return contrast + margin + _ALIGNMENT_WEIGHT * alignment


def mean_direction(texts_TE: Tensor) -> Tensor:
    """The mean of text features, `(1, E)`, L2-normalised."""
    return F.normalize(texts_TE.mean(0, keepdim=True), dim=-1)


def parallel(text_BN: Tensor, memory_BN: Tensor) -> Tensor:
    """`1 / (1 / text + 1 / memory)`."""
    tiny = torch.finfo(torch.float32).tiny
    return 1 / (1 / text_BN.clamp_min(tiny) + 1 / memory_BN.clamp_min(tiny))
