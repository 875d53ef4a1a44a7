"""SMGS: the self-optimising meta-prompt guiding scheme.

A meta-prompt, the same for every category, says "normal" and "anomalous" in general terms. Where
the gradient of the loss on synthetic anomalies would lead the learned prompts away from it, the
conflicting part is removed, so that they do not overfit to the synthetic noise. After each round
the meta-prompt takes over a little of what the prompts have learned, if that makes it better.

T lanes, P prompts (0 normal, the others anomalous), L context length, C token width, E joint width.
"""

import torch
import torch.nn.functional as F

from apt_ray.features.protocol import TextEncoder

NORMAL_STATES = (
    "a normal surface",
    "a flawless part",
    "an intact product",
    "a surface without defect",
    "a part without damage",
    "an unblemished object",
)
ANOMALOUS_STATES = (
    "an anomalous surface",
    "a flawed part",
    "a broken product",
    "a surface with a defect",
    "a part with damage",
    "a defective object",
)

META_STEP = 0.1
"""Share of the learned prompts that the meta-prompt takes over after a round."""

ROUND = 20
"""Optimisation steps between two attempts to move the meta-prompt."""

_NO_GUIDANCE = 1e-12

# "a surface without defect", "a surface with a defect": of two tokens, they still differ.
_FIRST_STATE = 3


def meta_features(backbone: TextEncoder) -> torch.Tensor:
    """The meta-prompt at the start, `(2, E)`: averaged features of states that fit any product."""
    return torch.stack(
        [
            F.normalize(backbone.encode_texts(states).mean(0), dim=-1)
            for states in (NORMAL_STATES, ANOMALOUS_STATES)
        ]
    )


def state_contexts(backbone: TextEncoder, prompts: int, length: int) -> torch.Tensor:
    """Contexts that say what the meta-prompt says, `(P, L, C)`: a place to start from.

    Each is the token embeddings of states in a row, cut at its front; the state at its end is
    another for every anomalous prompt.
    """
    contexts = []
    for prompt in range(prompts):
        states = NORMAL_STATES if prompt == 0 else ANOMALOUS_STATES
        last = (_FIRST_STATE + max(prompt - 1, 0)) % len(states)
        words = [backbone.embed_words(state) for state in states[last + 1 :] + states[: last + 1]]
        words_XC = torch.cat(words)
        repeats = -(-length // len(words_XC))
        contexts.append(words_XC.repeat(repeats, 1)[-length:])
    return torch.stack(contexts)


def remove_conflict(
    gradient_TPLC: torch.Tensor, guide_TPLC: torch.Tensor, weight_T: torch.Tensor
) -> torch.Tensor:
    """Gradient surgery: take out of `gradient` the part that points against `guide`.

    The projection is that of PCGrad (Yu et al., arXiv 2001.06782), one way only, as ProGrad aligns
    prompts with general knowledge (Zhu et al., arXiv 2205.14865).

    Per lane, over all its contexts together: with `c = <g, h>`, if `c < 0` and `|h|^2 > 1e-12`,
    then `g - weight * c / |h|^2 * h`; else `g`. Weight 0 changes nothing, 1 leaves `<g, h> = 0`.
    """
    gradient_TX, guide_TX = gradient_TPLC.flatten(1), guide_TPLC.flatten(1)
    agreement_T = (gradient_TX * guide_TX).sum(1)
    square_T = guide_TX.square().sum(1)
    conflicts_T = (agreement_T < 0) & (square_T > _NO_GUIDANCE)
    share_T = torch.where(conflicts_T, weight_T * agreement_T / square_T, 0.0)
    return gradient_TPLC - share_T[:, None, None, None] * guide_TPLC


def move_meta(meta_T2E: torch.Tensor, learned_TPE: torch.Tensor) -> torch.Tensor:
    """The meta-prompt one step nearer to the learned text features, normalised again.

    Its anomalous side moves towards the middle of all anomalous prompts.
    """
    anomalous_TE = F.normalize(learned_TPE[:, 1:].mean(1), dim=-1)
    learned_T2E = torch.stack([learned_TPE[:, 0], anomalous_TE], dim=1)
    return F.normalize(torch.lerp(meta_T2E, learned_T2E, META_STEP), dim=-1)
