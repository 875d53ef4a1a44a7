"""What apt-ray asks of a registry, whichever keeps the versions."""

import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from apt_ray.config import OperatorThreshold
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import (
    PromptSetError,
    RegistryConflictError,
    RegistryError,
    WriteError,
)
from apt_ray.files import AnyPath, StrPath, location
from apt_ray.registry import pending as waiting_room
from apt_ray.registry.contents import (
    DATA,
    HELD_OUT,
    Record,
    inherit_images,
    sha256,
    write_version,
)
from apt_ray.registry.history import Action, History, Move

CANDIDATE = "candidate"
CHAMPION = "champion"


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredVersion:
    """One version of a category's prompt set, as the registry knows it.

    Attributes:
        aliases: those that point to it.
        run_id: the run that holds its files; empty for a version that somebody else put there.
        tags: its provenance.
        settings: of its fit and its backbone, as text.
        metrics: validation values and others.
        created: when it was registered, ISO 8601 in UTC; empty if the registry does not say.
    """

    category: str
    version: int
    aliases: tuple[str, ...]
    run_id: str
    tags: Mapping[str, str]
    settings: Mapping[str, str]
    metrics: Mapping[str, float]
    created: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredCategory:
    """One category, as the registry knows it.

    Attributes:
        aliases: alias -> version.
        threshold: what a person decided last about its threshold, if anybody did.
    """

    aliases: Mapping[str, int]
    threshold: OperatorThreshold | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedVersion:
    """All of a version but its files, for `Registry.restore`.

    Attributes:
        record: what it was submitted with, and what was annotated since.
        run_id: the run that held its files.
        page: what people read of it.
        created: when it was registered, as in `RegisteredVersion`.
    """

    record: Record
    run_id: str
    page: str
    created: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedTrial:
    """A trial of a search, for `Registry.log_trials`; metrics are (step, value) pairs."""

    category: str
    number: int
    settings: Mapping[str, object]
    metrics: Mapping[str, Sequence[tuple[int, float]]]
    status: str


class Registry(Protocol):
    """The versions of each category's prompt set, and which of them serves.

    An implementation names this as its base: what follows from the other methods is written here.

    Attributes:
        address: where it is, without credentials, fit for messages.

    Raises:
        RegistryUnavailableError: From every method, if the registry does not answer.
        RegistryError: From every method, if it refuses.
    """

    address: str

    @abstractmethod
    def check(self) -> None:
        """Raise RegistryError within seconds if the registry cannot be reached."""

    @abstractmethod
    def categories(self) -> dict[str, RegisteredCategory]:
        """Every category, in one question."""

    def aliases(self) -> dict[str, dict[str, int]]:
        """Category -> alias -> version, for every category."""
        return {name: dict(category.aliases) for name, category in self.categories().items()}

    def champions(self) -> dict[str, int]:
        """Category -> version of its champion, for every category that has one."""
        return {
            category: aliases[CHAMPION]
            for category, aliases in self.aliases().items()
            if CHAMPION in aliases
        }

    def register(
        self,
        prompt_set: PromptSet,
        *,
        pictures: Mapping[str, Image.Image],
        trials: Sequence[Mapping[str, object]],
        tags: Mapping[str, str] = {},
        support: Sequence[AnyPath] = (),
        held_out: Sequence[AnyPath] = (),
        inherit: RegisteredVersion | None = None,
        promote: bool = True,
        submission: str | None = None,
        pending: StrPath | None = None,
    ) -> RegisteredVersion:
        """Store a prompt set as the category's newest version and make it the candidate.

        It becomes the champion as well where the category has none yet and `promote` is set.

        Args:
            prompt_set: What is registered; its metrics and settings are logged with it.
            pictures: File name without suffix -> what is drawn for people, under the version.
            trials: One row a trial of the search, all with the same keys.
            tags: Provenance that the prompt set itself does not carry.
            support: Files of its support images.
            held_out: Files of further normal images; small copies of some are kept with the
                version, so that it can be compared with later ones.
            inherit: A version of whose images it knows all, beside its own: what that one says of
                them is kept with it.
            promote: Whether it may become the champion.
            submission: The caller's own name of this version, unlike that of any other: whatever is
                registered again under it, now or from `pending`, is the version that was first.
            pending: Where the version is kept if the registry cannot take it; see
                `register_pending`.
        """
        with tempfile.TemporaryDirectory(prefix="apt-ray-") as name:
            folder = Path(name) / "version"
            folder.mkdir()
            record = write_version(
                folder,
                prompt_set,
                pictures=pictures,
                trials=trials,
                tags=tags,
                support=[location(path) for path in support],
                held_out=[location(path) for path in held_out],
                submission=submission,
                may_serve=promote,
            )
            if inherit is not None:
                for path in (DATA, HELD_OUT):
                    if (found := self.download(inherit, path, Path(name))) is not None:
                        inherit_images(folder, found)
            try:
                return self.submit(folder, record)
            except RegistryError as error:
                if pending is None:
                    raise
                place = f"{record.category}-{sha256(record.submission.encode())[:16]}"
                try:
                    kept = waiting_room.keep(folder, place, Path(pending))
                except WriteError as full:
                    raise type(error)(
                        f"{error}. Nor can the version be kept ({full}): name a folder for it in"
                        " APT_RAY_PENDING, and register again"
                    ) from error
                raise type(error)(
                    f"{error}. The version is kept in {kept}: once the registry is back, run"
                    " `apt-ray registry pending`"
                ) from error

    def register_pending(self, pending: StrPath) -> Iterator[RegisteredVersion]:
        """Register the versions that wait in a folder, oldest first, each exactly once.

        A version is removed from the folder once it is registered. The first that the registry
        does not take ends the iteration with its error.
        """
        for folder in waiting_room.waiting(Path(pending)):
            registered = self.submit(folder, Record.read(folder))
            waiting_room.remove(folder)
            yield registered

    @abstractmethod
    def submit(self, folder: Path, record: Record) -> RegisteredVersion:
        """Store what `write_version` wrote, as `register` says.

        One that an earlier attempt has stored is the version that it was then.
        """

    @abstractmethod
    def resolve(self, category: str, reference: str = CHAMPION) -> RegisteredVersion:
        """The version behind an alias or a version number.

        Raises:
            RegistryError: The category, alias or version does not exist; names those that do.
        """

    def load(
        self, category: str, reference: str = CHAMPION, *, fingerprint: str | None = None
    ) -> tuple[PromptSet, RegisteredVersion]:
        """The prompt set behind an alias or a version number, and which version that is.

        Args:
            fingerprint: of the backbone that is to use it; None takes any.

        Raises:
            RegistryError: As `resolve`, or the version holds no prompt set.
            PromptSetError: The stored file is damaged, was changed after it was registered, or
                belongs to another category or backbone.
        """
        registered = self.resolve(category, reference)
        return _checked(self.fetch(registered), registered, fingerprint), registered

    @abstractmethod
    def fetch(self, registered: RegisteredVersion) -> bytes:
        """The file of a version's prompt set, unchecked; RegistryError if it has none."""

    @abstractmethod
    def download(self, registered: RegisteredVersion, path: str, folder: Path) -> Path | None:
        """Fetch a file or folder of a version into `folder`; None if the version has none."""

    def diff(
        self, category: str, left: str = CHAMPION, right: str = CANDIDATE
    ) -> list[tuple[str, str | None, str | None]]:
        """(name, left, right) of every setting, metric and tag in which two versions differ."""
        sides = [_described(self.resolve(category, reference)) for reference in (left, right)]
        return [
            (name, sides[0].get(name), sides[1].get(name))
            for name in sorted({*sides[0], *sides[1]})
            if sides[0].get(name) != sides[1].get(name)
        ]

    @abstractmethod
    def history(self, category: str) -> History:
        """How the champion of a category came to be that; RegistryError if there is no category."""

    @abstractmethod
    def move(self, history: History, target: int, *, action: Action, why: str) -> Move:
        """Make a version the champion, if nothing has moved since `history` was read.

        Raises:
            RegistryConflictError: Somebody else was faster; nothing was changed.
        """

    @abstractmethod
    def withdraw(self, category: str, version: int) -> None:
        """Take the alias `candidate` from a version.

        Raises:
            RegistryConflictError: It is no longer the candidate; nothing was changed.
        """

    def page(self, category: str, version: int) -> str:
        """Where people read of a version, from the registry's own address on; empty if nowhere."""
        return ""

    @abstractmethod
    def set_threshold(self, category: str, threshold: OperatorThreshold) -> None:
        """Keep what a person decided about a category's threshold, in the place of what was decided
        before; RegistryError if there is no category."""

    @abstractmethod
    def annotate(
        self, registered: RegisteredVersion, tags: Mapping[str, str], *, report: str, name: str
    ) -> None:
        """Add tags and a Markdown report to a version; a later report takes its place on the page,
        and the files of all of them stay with the run."""

    @abstractmethod
    def versions(self, category: str) -> list[int]:
        """The versions of a category, newest first."""

    @abstractmethod
    def delete(self, category: str, version: int) -> None:
        """Delete a version."""

    @abstractmethod
    def export(self, registered: RegisteredVersion, folder: Path) -> ExportedVersion:
        """Write the files of a version to an empty folder, those of `write_version` and the reports
        on it, and return the rest; RegistryError if it has none."""

    @abstractmethod
    def restore(self, folder: Path, exported: ExportedVersion) -> RegisteredVersion:
        """Store what `export` wrote and returned, as the newest version of its category.

        It becomes the candidate, and never the champion. One that was restored before is the
        version that it was then.
        """

    @abstractmethod
    def restore_category(
        self,
        category: str,
        *,
        aliases: Mapping[str, int],
        moves: Sequence[Move],
        threshold: OperatorThreshold | None,
    ) -> None:
        """Let a category have exactly these aliases, this history and this threshold; the champion
        comes last."""

    @abstractmethod
    def log_trials(self, search: str, trials: Sequence[LoggedTrial]) -> None:
        """Keep trials, each once, whatever is repeated.

        Args:
            search: Name of the search.
            trials: Ended trials.
        """

    def _no_candidate(self, category: str, version: int, candidate: int | None) -> RegistryError:
        """For whoever takes the alias from a version that does not have it."""
        now = "there is none" if candidate is None else f"version {candidate} is"
        return RegistryConflictError(
            f"version {version} of {category} is no longer the candidate, {now}; nothing was"
            " changed: look at the versions, then decide again"
        )

    def _absent(self, category: str, reference: str) -> RegistryError:
        """For a reference to what does not exist; names what does."""
        known = self.aliases()
        if category not in known:
            return RegistryError(
                f"the registry at {self.address} has no category {category!r}; "
                f"it has {', '.join(sorted(known)) or 'none yet'}"
            )
        aliases = ", ".join(
            f"{alias} (version {known[category][alias]})" for alias in known[category]
        )
        return RegistryError(
            f"category {category!r} has no version or alias {reference!r} in the registry at "
            f"{self.address}; its aliases are: {aliases or 'none'}"
        )


def _described(registered: RegisteredVersion) -> dict[str, str]:
    """Everything that the registry says of a version, as text."""
    return {
        "version": str(registered.version),
        **registered.tags,
        **registered.settings,
        **{name: f"{value:.4f}" for name, value in registered.metrics.items()},
    }


def _checked(data: bytes, registered: RegisteredVersion, fingerprint: str | None) -> PromptSet:
    source = f"version {registered.version} of {registered.category}"
    expected = registered.tags.get("sha256")
    if expected is not None and sha256(data) != expected:
        raise PromptSetError(
            f"{source} is not the file that was registered (its SHA-256 is {sha256(data)}, not"
            f" {expected}): somebody or something has changed it; use another version, or register"
            " the category again"
        )
    prompt_set = PromptSet.from_bytes(data, source=source)
    if prompt_set.category != registered.category:
        raise PromptSetError(
            f"{source} holds a prompt set of {prompt_set.category}: register it there instead"
        )
    if fingerprint is not None and prompt_set.fingerprint != fingerprint:
        raise PromptSetError(
            f"{source} was fitted to another backbone ({prompt_set.backbone.name}, fingerprint"
            f" {prompt_set.fingerprint}) than the one loaded ({fingerprint}): load the backbone"
            " that it names, or fit the category again"
        )
    return prompt_set
