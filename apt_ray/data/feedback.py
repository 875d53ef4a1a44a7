"""What people say of inspected images, kept where people and programs can read it.

    <folder>/<category>/<id>.json     what one caller says of one request
    <folder>/<category>/<id>.jpg      its image, beside it (.png, .bmp, .tif, .webp if it came so)
    <folder>/<category>/<id>.withdrawn  empty, for a day: it was said, and still counts as such

An id is `20261129T142530123456Z-false_alarm-<request>-<caller>`: when, what, and the first digits
of the digests of the request's id and of the caller's name. All that is counted and compared stands
in the names, so a listing of the folder is the index, and of several processes none spoils
another's work: a file is written whole, its image before it, and never changed.

The folder is local, or `s3://bucket/prefix`.
"""

import hashlib
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Literal, get_args

from pydantic import Field, ValidationError

from apt_ray.config import Settings
from apt_ray.errors import DataError, FeedbackError, FeedbackQuotaError
from apt_ray.files import AnyPath, Location, absolute, put, read_file, remove, sizes

Label = Literal["false_alarm", "missed_defect", "confirmed_defect", "confirmed_good"]
"""A good part that was rejected, a defect that passed, a defect that was rejected, a good part that
passed."""

Kept = Label | Literal["sampled"]
"""What a file is of: `sampled` is an image that was drawn at random, to be judged."""

Truth = Literal["good", "defective"]

MOST_AT_ONCE = 8
"""False alarms that join a memory at a time: more leave nobody time to see what they do."""

LABELS: tuple[Label, ...] = get_args(Label)
_TRUTHS: Mapping[str, Truth] = {
    "false_alarm": "good",
    "confirmed_good": "good",
    "missed_defect": "defective",
    "confirmed_defect": "defective",
}
_ID = re.compile(
    rf"(?P<at>\d{{8}}T\d{{12}}Z)-(?P<label>{'|'.join(LABELS)}|sampled)"
    r"-(?P<request>[0-9a-f]{16})-(?P<caller>[0-9a-f]{8})"
)
_AT = "%Y%m%dT%H%M%S%fZ"
_SUFFIXES = ("jpg", "png", "bmp", "tif", "webp")
_WITHDRAWN = "withdrawn"
_DAY_S = 86400.0
# For so long a caller who has said enough is refused without a look at the folder.
_REFUSED_S = 60.0
# An image without its file is of a caller that writes just now, or of one that was killed.
_ORPHANED_S = 3600.0
_LARGEST_SHARE = 0.5


class Box(Settings):
    """A place in an image, in pixels of the image that was inspected."""

    x: int = Field(ge=0, description="Left edge.")
    y: int = Field(ge=0, description="Upper edge.")
    width: int = Field(ge=1)
    height: int = Field(ge=1)

    def is_within(self, size: tuple[int, int]) -> bool:
        """Whether it lies in an image of `size` = (width, height)."""
        return self.x + self.width <= size[0] and self.y + self.height <= size[1]


class Feedback(Settings):
    """What one caller says of one inspected image."""

    id: str = ""
    category: str
    request_id: str = Field(description="The name of the request that inspected it.")
    label: Kept
    kind: str = Field(default="", description="What kind of defect, or of false alarm.")
    boxes: tuple[Box, ...] = Field(
        default=(), description="Where, in pixels of the image that was inspected."
    )
    note: str = ""
    by: str = Field(default="", description="The name of the caller's token.")
    at: str = Field(default="", description="When it was said, ISO 8601, UTC.")
    width: int = Field(description="Of the image that was inspected, in pixels.")
    height: int = Field(description="Likewise; the file that is kept may be smaller.")
    image: str = Field(default="", description="The file of the image, beside this one.")
    sha256: str = Field(default="", description="Of that file.")
    source: Literal["history", "caller"] = Field(
        description="Whether the image is of the fleet's own history, or was sent by the caller."
    )
    version: int | None = Field(default=None, description="That inspected it, if it is known.")
    score: float | None = Field(default=None, description="Its anomaly score, likewise.")
    threshold: float | None = Field(default=None, description="Of then, likewise.")
    sample: str = Field(default="", description="Of what was drawn: the name of the sample.")
    sample_size: int = Field(default=0, description="How many images that sample has.")

    @property
    def truth(self) -> Truth | None:
        """What it says that the part is; None of what was only drawn."""
        return _TRUTHS.get(self.label)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What an id says.

    Attributes:
        at: seconds since 1970.
        request, caller: digests.
    """

    id: str
    at: float
    label: Kept
    request: str
    caller: str

    @classmethod
    def of(cls, identifier: str) -> "Entry | None":
        """None of what is no id."""
        found = _ID.fullmatch(identifier)
        if found is None:
            return None
        try:
            at = datetime.strptime(found["at"], _AT).replace(tzinfo=timezone.utc).timestamp()
        except ValueError:
            return None
        return cls(
            id=identifier,
            at=at,
            label=found["label"],  # type: ignore[arg-type]
            request=found["request"],
            caller=found["caller"],
        )

    @property
    def truth(self) -> Truth | None:
        return _TRUTHS.get(self.label)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What all callers say of one image.

    Attributes:
        entries: theirs, newest first; at least one.
        truth: what they agree on; None if they do not.
        callers: how many they are.
    """

    entries: tuple[Entry, ...]
    truth: Truth | None
    callers: int


class FeedbackStore:
    """Feedback of all categories, bounded in images, bytes and days for each of them.

    Args:
        folder: where it lies; on several nodes one that all of them reach.
        images, mib, days: of a category at most; what is older is removed when the category is
            looked at next.
        per_day: what one caller may say of a category within 24 hours, withdrawn or not.
        clock: seconds since 1970.

    Raises:
        DataError, WriteError: from every method, if the folder cannot be read or written.
    """

    def __init__(
        self,
        folder: AnyPath,
        *,
        images: int = 1000,
        mib: float = 1024,
        days: float = 365,
        per_day: int = 200,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder = absolute(folder)
        self._images, self._bytes, self._days = images, int(mib * 2**20), days
        self._per_day = per_day
        self._clock = clock
        self._giving = threading.Lock()
        self._refused: dict[tuple[str, str], _Refused] = {}

    def check(self, category: str, by: str, requests: Collection[str], *, size: int = 0) -> None:
        """Raise what `give` would, before there is work for it.

        Who was refused a moment ago is so again without a look at the folder.

        Args:
            by: who wants to say something.
            requests: the names that the request may have.
            size: bytes of the image, as far as they are known.
        """
        caller, named = _caller(by), {_digest(request, 16) for request in requests}
        refused, now = self._refused.get((category, caller)), self._clock()
        if refused and now < refused.until and named.isdisjoint(refused.requests):
            raise refused.error(now)
        kept = self._listing(category)
        # What takes the place of something else is for `give` to judge.
        if not any(
            entry.truth and entry.caller == caller and entry.request in named
            for entry in kept.entries
        ):
            self._check_quota(category, by, kept)
            self._check_room(category, kept, size, new=True)

    def give(self, said: Feedback, image: bytes, suffix: str) -> Feedback:
        """Keep what a caller says of an image, in place of what the same said of it before.

        Said again as it was, nothing changes. Killed in between, at worst an image lies there that
        belongs to nothing, which is removed an hour later.

        Args:
            said: without id and time, which it gets here.
            image: the file.
            suffix: of the file's kind, such as `jpg`.

        Raises:
            FeedbackQuotaError: the caller has said as much as one may.
            FeedbackError: the category has as much as it may.
        """
        with self._giving:
            kept = self._listing(said.category)
            mine = [
                entry
                for entry in kept.entries
                if (entry.request, entry.caller) == (_digest(said.request_id, 16), _caller(said.by))
                and (entry.label == "sampled") == (said.label == "sampled")
            ]
            for entry in mine:
                there = self._read(said.category, entry.id)
                if there is not None and _content(there) == _content(said):
                    return there
            if not mine:
                self._check_quota(said.category, said.by, kept)
            self._check_room(said.category, kept, len(image), new=not mine)
            given = self._write(said, image, suffix, self._clock())
            for entry in mine:
                self._remove(said.category, entry.id)
            return given

    def draw(self, drawn: Sequence[tuple[Feedback, bytes, str]]) -> list[Feedback]:
        """Keep images that were drawn at random, as one sample: what is said of them counts for
        calibration once something is said of each. Args and errors as of `give`.
        """
        category = drawn[0][0].category
        with self._giving:
            kept = self._listing(category)
            size = sum(len(image) for _, image, _ in drawn)
            self._check_room(category, kept, size, new=True, images=len(drawn))
            now = self._clock()
            named = {"sample": _time(now), "sample_size": len(drawn)}
            return [
                self._write(said.model_copy(update=named), image, suffix, now)
                for said, image, suffix in drawn
            ]

    def page(
        self,
        category: str,
        *,
        before: str | None = None,
        limit: int = 50,
        label: Kept | None = None,
    ) -> list[Feedback]:
        """What was said of a category, newest first: at most `limit` of those with a lower id than
        `before`."""
        found: list[Feedback] = []
        for entry in reversed(self._listing(category).entries):
            if len(found) == limit:
                break
            if (before is None or entry.id < before) and label in (None, entry.label):
                there = self._read(category, entry.id)
                found += [there] if there is not None else []
        return found

    def judgements(self, category: str) -> dict[str, Judgement]:
        """What is said of each image: digest of its request -> judgement, the newest first."""
        entries = defaultdict(list)
        for entry in reversed(self._listing(category).entries):
            if entry.truth is not None:
                entries[entry.request].append(entry)
        found = {}
        for request, some in entries.items():
            truths = {entry.truth for entry in some}
            found[request] = Judgement(
                entries=tuple(some),
                truth=truths.pop() if len(truths) == 1 else None,
                callers=len({entry.caller for entry in some}),
            )
        return found

    def samples(self, category: str) -> dict[str, list[Entry]]:
        """The samples that were drawn: name -> what is left of it, the oldest sample first."""
        found: dict[str, list[Entry]] = defaultdict(list)
        for entry in self._listing(category).entries:
            if entry.label == "sampled":
                found[entry.id.partition("-")[0]].append(entry)
        return dict(found)

    def find(self, category: str, identifier: str) -> Feedback | None:
        """One of them; None if there is none of that id."""
        return None if Entry.of(identifier) is None else self._read(category, identifier)

    def drawn(self, category: str, request_id: str) -> Feedback | None:
        """The image of a request that is in a sample; None if there is none."""
        request = _digest(request_id, 16)
        for entry in self._listing(category).entries:
            if entry.label == "sampled" and entry.request == request:
                return self._read(category, entry.id)
        return None

    def path(self, feedback: Feedback) -> Location:
        """The file of an image."""
        return self.folder / feedback.category / feedback.image

    def withdraw(self, category: str, identifier: str) -> None:
        """Remove one of them with its image; nothing happens if it is not there."""
        entry = Entry.of(identifier)
        if entry is None or f"{identifier}.json" not in sizes(self.folder / category):
            return
        self._remove(category, identifier)
        if entry.truth and self._clock() - entry.at < _DAY_S:
            put(self.folder / category / f"{identifier}.{_WITHDRAWN}", b"", private=True)

    # ---- the files

    def _listing(self, category: str) -> "_Listing":
        """What lies there of a category; what is too old is removed."""
        found = sizes(self.folder / category)
        now = self._clock()
        images: dict[str, str] = {}
        entries: list[Entry] = []
        withdrawn: list[Entry] = []
        for name in found:
            stem, _, suffix = name.rpartition(".")
            entry = Entry.of(stem)
            if entry is None or suffix not in (*_SUFFIXES, "json", _WITHDRAWN):
                continue  # a person's own
            age_s = now - entry.at
            is_alone = suffix in _SUFFIXES and f"{stem}.json" not in found
            days = 1 if suffix == _WITHDRAWN else self._days
            if age_s > days * _DAY_S or (is_alone and age_s > _ORPHANED_S):
                remove(self.folder / category / name)
            elif suffix == "json":
                entries.append(entry)
            elif suffix == _WITHDRAWN:
                withdrawn.append(entry)
            else:
                images[stem] = name
        return _Listing(
            entries=_latest(entries),
            withdrawn=withdrawn,
            images=images,
            size=sum(found[name] for name in images.values()),
        )

    def _check_quota(self, category: str, by: str, kept: "_Listing") -> None:
        caller, now = _caller(by), self._clock()
        theirs = [entry for entry in kept.entries if entry.caller == caller and entry.truth]
        gone = [entry for entry in kept.withdrawn if entry.caller == caller]
        lately = [entry.at for entry in (*theirs, *gone) if now - entry.at < _DAY_S]
        who = by or "whoever has no token"
        if len(lately) >= self._per_day:
            free_at = min(lately) + _DAY_S
            refused = self._refused[category, caller] = _Refused(
                why=f"{who} has said something of {len(lately)} images of {category} within 24"
                " hours, as many as one may, withdrawn or not",
                free_at=free_at,
                until=min(free_at, now + _REFUSED_S),
                requests=frozenset(entry.request for entry in theirs),
            )
            raise refused.error(now)
        # Whatever one caller does, there is room for the others.
        if by and len(theirs) >= max(1, int(_LARGEST_SHARE * self._images)):
            raise FeedbackQuotaError(
                f"{who} has said something of {len(theirs)} images of {category} that are kept, and"
                f" half of {self._images} is one caller's at most",
                retry_after_s=round(_DAY_S),
            )

    def _check_room(
        self, category: str, kept: "_Listing", size: int, *, new: bool, images: int = 1
    ) -> None:
        if new and len(kept.entries) + images > self._images:
            raise FeedbackError(
                f"{len(kept.entries)} images of {category} are kept, and {self._images} may be"
            )
        if kept.size + size > self._bytes:
            raise FeedbackError(
                f"images of {category} fill {kept.size / 2**20:.1f} MiB, and"
                f" {self._bytes / 2**20:g} MiB may be filled"
            )

    def _write(self, said: Feedback, image: bytes, suffix: str, now: float) -> Feedback:
        identifier = f"{_time(now)}-{said.label}-{_digest(said.request_id, 16)}-{_caller(said.by)}"
        at = datetime.fromtimestamp(now, timezone.utc).isoformat(timespec="milliseconds")
        given = said.model_copy(
            update={
                "id": identifier,
                "at": at,
                "image": f"{identifier}.{suffix}",
                "sha256": hashlib.sha256(image).hexdigest(),
            }
        )
        put(self.path(given), image, private=True)
        text = given.model_dump_json(indent=2) + "\n"
        put(self.folder / said.category / f"{identifier}.json", text.encode(), private=True)
        return given

    def _read(self, category: str, identifier: str) -> Feedback | None:
        """None if it is not there, or if somebody has spoilt it."""
        name = f"{identifier}.json"
        try:
            return Feedback.model_validate_json(read_file(self.folder / category / name))
        except ValidationError:
            return None
        except DataError:
            if name in sizes(self.folder / category):
                raise
            return None

    def _remove(self, category: str, identifier: str) -> None:
        remove(self.folder / category / f"{identifier}.json")  # first: an image alone is nothing
        for suffix in _SUFFIXES:
            remove(self.folder / category / f"{identifier}.{suffix}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Refused:
    """A caller who has said enough of a category.

    Attributes:
        free_at: when one may say something again, seconds since 1970.
        until: when the folder is looked at again, likewise.
        requests: digests of those of which something was said, and may be said anew.
    """

    why: str
    free_at: float
    until: float
    requests: frozenset[str]

    def error(self, now: float) -> FeedbackQuotaError:
        return FeedbackQuotaError(self.why, retry_after_s=max(1, round(self.free_at - now)))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Listing:
    """What lies there of a category.

    Attributes:
        entries: in the order of their ids, the oldest first.
        withdrawn: of the last day.
        images: id -> file.
        size: bytes of all images.
    """

    entries: list[Entry]
    withdrawn: list[Entry]
    images: dict[str, str]
    size: int


def _latest(entries: list[Entry]) -> list[Entry]:
    """Of what one caller says of one request the last alone: who was killed left both."""
    last = {(each.request, each.caller, each.label == "sampled"): each for each in entries}
    return sorted(last.values(), key=lambda entry: entry.id)


def _content(said: Feedback) -> dict[str, object]:
    """What makes two of them the same."""
    return said.model_dump(include={"label", "kind", "boxes", "note"})


def _digest(text: str, length: int) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:length]


def _caller(name: str) -> str:
    return _digest(name, 8)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime(_AT)
