"""The controller as the other processes of the fleet reach it."""

from typing import Protocol

from serving.controller.drift import DriftsCleared
from serving.controller.moves import MoveOrder, Operation, VersionSummary
from serving.controller.orders import (
    CategoryThreshold,
    FleetStatus,
    Orders,
    ReplicaReport,
    Routes,
    StoredVersion,
)
from serving.controller.shadow import ShadowStatus


class ControllerClient(Protocol):
    """What may be asked of the controller; any error but an AptError means that it does not
    answer."""

    async def follow(
        self, pool: str, replica: str, report: ReplicaReport, *, wait_s: float
    ) -> Orders:
        """What a pool shall serve, once it differs from `report.orders` or after `wait_s`."""
        ...

    async def resolve(self, category: str, alias: str) -> int | None:
        """The version behind an alias of a category, None if there is none.

        RegistryUnavailableError if the registry has not said yet.
        """
        ...

    async def fetch(self, category: str, version: int) -> StoredVersion:
        """A version's prompt set; an AptError says why there is none."""
        ...

    async def routes(self, known: str) -> Routes:
        """Which pool has what, once its etag differs from `known` or after a while."""
        ...

    async def status(self) -> FleetStatus:
        """Everything at a glance."""
        ...

    async def audit_lines(self) -> list[dict[str, object]]:
        """The last operations, oldest first."""
        ...

    async def wake(self, reason: str) -> None:
        """Ask the registry now."""
        ...

    async def move(self, order: MoveOrder) -> Operation:
        """Begin to move an alias of a category.

        RegistryConflictError while another is moved, NotTriedEnoughError if the candidate has not
        shown what its promotion asks for.
        """
        ...

    async def operation(self, identifier: str) -> Operation | None:
        """A move that was begun, if the controller knows it."""
        ...

    async def versions(self, category: str, limit: int) -> list[VersionSummary]:
        """The newest versions of a category, newest first. Raises RegistryError."""
        ...

    async def pictures(self, category: str, version: int) -> tuple[str, ...] | None:
        """The names of a version's pictures; None of an unknown one. Raises RegistryError."""
        ...

    async def picture(self, category: str, version: int, name: str) -> bytes | None:
        """One of them, a PNG file; None if there is none of that name. Raises RegistryError."""
        ...

    async def threshold(self, category: str) -> CategoryThreshold:
        """Who says what the threshold of a category of the fleet is."""
        ...

    async def set_threshold(
        self, category: str, value: float | None, *, reason: str, by: str
    ) -> CategoryThreshold:
        """Keep an operator's decision in the registry, for all to follow; None takes back what was
        decided. A RegistryError says why it cannot be kept."""
        ...

    async def reset_drift(
        self, category: str, *, anew: bool, reason: str, by: str
    ) -> DriftsCleared:
        """Take back the alarms of a category; `anew`, its next images are the new reference."""
        ...

    async def shadow(self, category: str) -> ShadowStatus | None:
        """What the candidate of a category makes of the same images; None where none is tried."""
        ...
