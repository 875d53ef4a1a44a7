"""A registry in memory, for the tests of whoever uses one."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

from apt_ray.config import OperatorThreshold
from apt_ray.errors import RegistryError, RegistryUnavailableError
from apt_ray.registry import (
    CANDIDATE,
    CHAMPION,
    History,
    LoggedTrial,
    Move,
    RegisteredCategory,
    RegisteredVersion,
)
from apt_ray.registry.contents import DIRECTORY, PROMPT_SET, Record
from apt_ray.registry.history import Action
from apt_ray.registry.protocol import ExportedVersion, Registry


@dataclass
class _Version:
    record: Record
    files: dict[str, bytes]
    tags: dict[str, str]
    created: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )


@dataclass
class _Category:
    versions: dict[int, _Version] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)
    registered: int = 0
    threshold: OperatorThreshold | None = None


class FakeRegistry(Registry):
    """Keeps versions in memory.

    Attributes:
        is_away: while it is set, every method raises RegistryUnavailableError.
        trials: (search, category, number) -> trial.
    """

    def __init__(self) -> None:
        self.address = "memory"
        self.is_away = False
        self.trials: dict[tuple[str, str, int], LoggedTrial] = {}
        self._categories: dict[str, _Category] = {}
        self._lock = threading.RLock()

    def set_alias(self, category: str, alias: str, version: int | None) -> None:
        """Move an alias past apt-ray, as a person may in MLflow; None removes it."""
        aliases = self._category(category, alias).aliases
        if version is None:
            del aliases[alias]
        else:
            aliases[alias] = version

    def check(self) -> None:
        if self.is_away:
            raise RegistryUnavailableError(f"no registry answers at {self.address}: call it back")

    def categories(self) -> dict[str, RegisteredCategory]:
        self.check()
        return {
            name: RegisteredCategory(aliases=dict(category.aliases), threshold=category.threshold)
            for name, category in self._categories.items()
        }

    def submit(self, folder: Path, record: Record) -> RegisteredVersion:
        self.check()
        with self._lock:
            category = self._categories.setdefault(record.category, _Category())
            versions = category.versions
            known = [n for n, one in versions.items() if one.record.submission == record.submission]
            if not known:
                category.registered += 1
                home = folder / DIRECTORY
                paths = [path for path in home.rglob("*") if path.is_file()]
                versions[category.registered] = _Version(
                    record,
                    {str(path.relative_to(home)): path.read_bytes() for path in paths},
                    dict(record.tags),
                )
            version = known[0] if known else category.registered
            category.aliases[CANDIDATE] = max(versions)
            if CHAMPION not in category.aliases and record.may_serve:
                history = self.history(record.category)
                self.move(history, version, action="first", why="the first version")
            return self.resolve(record.category, str(version))

    def resolve(self, category: str, reference: str = CHAMPION) -> RegisteredVersion:
        known = self._category(category, reference)
        number = int(reference) if reference.isdecimal() else known.aliases.get(reference, 0)
        if number not in known.versions:
            raise self._absent(category, reference)
        version = known.versions[number]
        return RegisteredVersion(
            category=category,
            version=number,
            aliases=tuple(alias for alias, target in known.aliases.items() if target == number),
            run_id=f"run of {category} {number}",
            tags=dict(version.tags),
            settings=version.record.params,
            metrics=version.record.metrics,
            created=version.created,
        )

    def fetch(self, registered: RegisteredVersion) -> bytes:
        files = self._files(registered)
        if PROMPT_SET not in files:
            raise RegistryError(f"version {registered.version} holds no prompt set: use another")
        return files[PROMPT_SET]

    def download(self, registered: RegisteredVersion, path: str, folder: Path) -> Path | None:
        wanted = {
            name: content
            for name, content in self._files(registered).items()
            if name == path or name.startswith(f"{path}/")
        }
        for name, content in wanted.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder / path if wanted else None

    def history(self, category: str) -> History:
        known = self._category(category, CHAMPION)
        return History.of(
            category,
            champion=known.aliases.get(CHAMPION),
            candidate=known.aliases.get(CANDIDATE),
            recorded=known.moves,
        )

    def move(self, history: History, target: int, *, action: Action, why: str) -> Move:
        with self._lock:
            known = self._category(history.category, CHAMPION)
            moves = self.history(history.category).followed_by(
                target, seen=history, action=action, who="somebody@memory", why=why
            )
            known.aliases[CHAMPION] = target
            known.moves += moves
            return moves[-1]

    def withdraw(self, category: str, version: int) -> None:
        with self._lock:
            aliases = self._category(category, CANDIDATE).aliases
            if aliases.get(CANDIDATE) != version:
                raise self._no_candidate(category, version, aliases.get(CANDIDATE))
            del aliases[CANDIDATE]

    def set_threshold(self, category: str, threshold: OperatorThreshold) -> None:
        self._category(category, CHAMPION).threshold = threshold

    def annotate(
        self, registered: RegisteredVersion, tags: Mapping[str, str], *, report: str, name: str
    ) -> None:
        known = self._category(registered.category, CHAMPION)
        known.versions[registered.version].tags.update(tags)

    def versions(self, category: str) -> list[int]:
        self.check()
        known = self._categories.get(category, _Category())
        return sorted(known.versions, reverse=True)

    def delete(self, category: str, version: int) -> None:
        known = self._category(category, str(version))
        if version not in known.versions:
            raise self._absent(category, str(version))
        del known.versions[version]
        known.aliases = {alias: n for alias, n in known.aliases.items() if n != version}

    def export(self, registered: RegisteredVersion, folder: Path) -> ExportedVersion:
        version = self._category(registered.category, "").versions[registered.version]
        for name, content in self._files(registered).items():
            (folder / DIRECTORY / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / DIRECTORY / name).write_bytes(content)
        return ExportedVersion(
            record=replace(version.record, tags=dict(version.tags), may_serve=False),
            run_id=registered.run_id,
            page="",
            created=version.created,
        )

    def restore(self, folder: Path, exported: ExportedVersion) -> RegisteredVersion:
        return self.submit(folder, exported.record)

    def restore_category(
        self,
        category: str,
        *,
        aliases: Mapping[str, int],
        moves: Sequence[Move],
        threshold: OperatorThreshold | None,
    ) -> None:
        known = self._category(category, CHAMPION)
        known.aliases, known.moves, known.threshold = dict(aliases), list(moves), threshold

    def log_trials(self, search: str, trials: Sequence[LoggedTrial]) -> None:
        self.check()
        for trial in trials:
            self.trials.setdefault((search, trial.category, trial.number), trial)

    def _category(self, category: str, reference: str) -> _Category:
        self.check()
        if category not in self._categories:
            raise self._absent(category, reference)
        return self._categories[category]

    def _files(self, registered: RegisteredVersion) -> dict[str, bytes]:
        known = self._category(registered.category, str(registered.version))
        return known.versions[registered.version].files
