"""How the champion of a category came to be that: one move of the alias at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Literal

from apt_ray.errors import RegistryConflictError

Action = Literal["first", "promote", "accept", "confirm", "rollback", "by hand"]


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

    @classmethod
    def of(
        cls,
        category: str,
        *,
        champion: int | None,
        candidate: int | None,
        recorded: Sequence[Move],
    ) -> "History":
        """The history of a category whose registry remembers these moves."""
        moves = list(recorded)
        last = moves[-1].target if moves else None
        if champion is not None and champion != last:
            moves.append(
                Move(
                    number=0,
                    at="",
                    who="",
                    action="by hand",
                    source=last,
                    target=champion,
                    why="the alias was moved in MLflow itself",
                )
            )
        return cls(category=category, champion=champion, candidate=candidate, moves=tuple(moves))

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

    def followed_by(
        self, target: int, *, seen: "History", action: Action, who: str, why: str
    ) -> list[Move]:
        """What is to be recorded if `target` becomes the champion now: moves by hand, then this.

        Raises:
            RegistryConflictError: The champion was moved since `seen` was read.
        """
        if (self.recorded, self.champion) != (seen.recorded, seen.champion):
            raise self.conflict()
        made = Move(
            number=0,
            at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            who=who,
            action=action,
            source=self.champion,
            target=target,
            why=why,
        )
        unrecorded = [move for move in self.moves if not move.number]
        return [
            replace(move, number=number)
            for number, move in enumerate([*unrecorded, made], self.recorded + 1)
        ]

    def conflict(self) -> RegistryConflictError:
        """For whoever decided on an earlier history than this."""
        last = self.moves[-1] if self.moves else None
        what = (
            f"{last.who} made version {last.target} the champion at {last.at} ({last.why})"
            if last and last.number
            else f"the champion is version {self.champion} now"
        )
        return RegistryConflictError(
            f"the champion of {self.category} was moved in the meantime: {what}; nothing was"
            " changed: look at the history, then decide again"
        )
