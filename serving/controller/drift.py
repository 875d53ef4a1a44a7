"""What replicas say of drift, and what the controller keeps of it.

An alarm stays until an operator resets it or another version serves, also when the replica that
raised it has ended: whoever comes after that one takes the images as they are by then for normal.
"""

import uuid
from collections.abc import Iterable

from pydantic import Field

from apt_ray.config import Settings
from apt_ray.detection.drift import DriftAlarm, StreamName
from serving.settings import CategoryName


class DriftReset(Settings):
    """An operator has seen the alarms of a category."""

    id: str
    anew: bool = Field(description="Whether images from now on are the new reference.")


class DriftReport(Settings):
    """What one replica sees of a category."""

    version: int
    learning: int = Field(description="Images that its reference lacks.")
    alarms: tuple[DriftAlarm, ...] = ()
    reset: str = Field(default="", description="Id of the last reset that it carried out.")


class DriftStatus(Settings):
    """Whether the images of a category, and their scores, are still what they were."""

    learning: int = Field(
        description="Images until every replica with traffic compares; 0: all of them do."
    )
    alarms: tuple[DriftAlarm, ...] = Field(
        description="What has drifted, until it is reset or another version serves."
    )


class DriftsCleared(Settings):
    """What a reset took back."""

    category: CategoryName
    cleared: tuple[StreamName, ...]
    anew: bool


class Drifts:
    """The alarms of all categories."""

    def __init__(self) -> None:
        self._alarms: dict[str, tuple[int, dict[StreamName, DriftAlarm]]] = {}
        self.resets: dict[str, DriftReset] = {}

    def hear(self, category: str, report: DriftReport) -> list[DriftAlarm]:
        """What a replica says; returns the alarms that nobody has raised before."""
        reset = self.resets.get(category)
        if not report.alarms or (reset and report.reset != reset.id):
            return []  # it has not heard of the reset
        version, known = self._alarms.get(category, (0, {}))
        if report.version != version:
            known = {}
        news = [alarm for alarm in report.alarms if alarm.stream not in known]
        self._alarms[category] = (
            report.version,
            {
                **known,
                **{alarm.stream: alarm for alarm in news},
            },
        )
        return news

    def status(
        self, category: str, versions: Iterable[int], reports: list[DriftReport]
    ) -> DriftStatus | None:
        """What is known of the versions that serve; None without anything."""
        version, alarms = self._alarms.get(category, (0, {}))
        if version not in versions:
            alarms = {}
        if not reports and not alarms:
            return None
        return DriftStatus(
            learning=max((report.learning for report in reports), default=0),
            alarms=tuple(alarms.values()),
        )

    def reset(self, category: str, *, anew: bool) -> DriftsCleared:
        """Take back the alarms of a category."""
        _, alarms = self._alarms.pop(category, (0, {}))
        self.resets[category] = DriftReset(id=uuid.uuid4().hex, anew=anew)
        return DriftsCleared(category=category, cleared=tuple(alarms), anew=anew)
