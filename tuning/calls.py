"""What a trial and an engine say to each other: plain values and bytes, no PyTorch.

An engine keeps nothing of a trial between two calls. A call brings the state of the trial's lanes
and its result takes the new state back, so any engine can serve any call, and a call that is made
again, of another engine or after a crash, has the same result.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class RungCall:
    """Train the lanes of one trial up to a step, and judge them there.

    Attributes:
        id: The same for every repetition of the same call, and for no other.
        banks: Digests of the banks that the lanes learn from, one for each support seed.
        judges: Digests of the judges of these, in the same order.
        layers: The judges' reference layers that the memory has; None is all of them.
        settings: Values of FitSettings; `steps` is the length of the schedule.
        steps: The step to stop at.
        state: Where the lanes stand; None is their start.
    """

    id: str
    banks: tuple[str, ...]
    judges: tuple[str, ...]
    layers: tuple[int, ...] | None
    settings: Mapping[str, Any]
    steps: int
    state: bytes | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RungResult:
    """What came of a RungCall.

    Attributes:
        state: Where the lanes stand now.
        steps: Steps that the trial has taken in all.
        validation: Validation value (AUROC, 0..1), mean over the judged images.
        validation_sd: Its standard deviation over them.
        patch: AUROC of ranking patches by the map.
        families: The value of each perturbation family.
        images: The value of each judged image.
        error: What was wrong with the call, if it was not served; the other values are void then.
    """

    state: bytes = b""
    steps: int = 0
    validation: float = 0.0
    validation_sd: float = 0.0
    patch: float = 0.0
    families: Mapping[str, float] = field(default_factory=dict)
    images: tuple[float, ...] = ()
    error: str | None = None


class EngineBusyError(Exception):
    """The engine holds as many calls as it may: call again later, or ask another one."""


class UnknownCallError(Exception):
    """The engine has no such call: it was restarted, or the call expired. Submit it again."""
