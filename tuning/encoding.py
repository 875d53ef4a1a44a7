"""How far the anomaly banks of the categories are. It knows neither Ray nor PyTorch."""

from collections.abc import Callable, Mapping
from typing import Literal

BankState = Literal["waiting", "ready", "failed"]

HasEnded = Callable[[], bool]
"""Whether all banks of a category are encoded, at once; raises why one cannot be."""


class Encoding:
    """The banks of all categories on their way.

    `poll` alone takes in what has come since; all else tells what it found, and changes nothing.

    Args:
        tasks: Category -> what encodes its banks; asked until it has ended or failed.

    Attributes:
        categories: Their names, whatever becomes of them.
    """

    def __init__(self, tasks: Mapping[str, HasEnded]) -> None:
        self.categories = tuple(tasks)
        self._waiting = dict(tasks)
        self._failed: set[str] = set()

    @property
    def is_waiting(self) -> bool:
        """Whether there is a category whose banks have neither come nor failed."""
        return bool(self._waiting)

    def state(self, category: str) -> BankState:
        """Whether trials of a category can start."""
        if category in self._waiting:
            return "waiting"
        return "failed" if category in self._failed else "ready"

    def poll(self) -> dict[str, Exception]:
        """Ask for what is waited for; the categories that have failed since, each once, and why."""
        failures: dict[str, Exception] = {}
        for category, has_ended in list(self._waiting.items()):
            try:
                if not has_ended():
                    continue
            except Exception as error:
                failures[category] = error
            del self._waiting[category]
        self._failed |= set(failures)
        return failures
