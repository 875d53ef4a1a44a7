"""How the champion of a category came to be that: one move of the alias at a time."""

from dataclasses import dataclass
from typing import Literal

Action = Literal["first", "promote", "rollback", "by hand"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """One change of a category's champion.

    Attributes:
        number: its place in the history, from 1; 0 for one that was made past apt-ray.
        at: when, ISO 8601 in UTC.
        who: user and machine.
        action: what kind of move.
        source: the version that served before, None if there was none.
        target: the version that serves since.
        why: the verdict or the reason given.
    """

    number: int
    at: str
    who: str
    action: Action
    source: int | None
    target: int
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """A category's champion and how it came to be that.

    Attributes:
        champion: the version that serves now, if any.
        candidate: the newest version, if any.
        moves: oldest first; the last is "by hand" if the alias was moved past apt-ray since.
    """

    category: str
    champion: int | None
    candidate: int | None
    moves: tuple[Move, ...]
    run_id: str | None

    @property
    def recorded(self) -> int:
        """How many moves stand in the registry."""
        return max((move.number for move in self.moves), default=0)

    def earlier(self) -> list[int]:
        """The versions that served before the present one, latest first; what was rolled back is
        not among them."""
        served: list[int] = []
        for move in self.moves:
            if move.action == "rollback" and move.target in served:
                del served[served.index(move.target) + 1 :]
            else:
                # A version that comes back for good counts from then on.
                served = [version for version in served if version != move.target]
                served.append(move.target)
        return served[-2::-1]
