"""Which feedback may be used, and versions made of it.

What callers disagree on is not used, nor what the champion has taken in already. Good parts
calibrate only as whole random samples: parts that somebody chose to confirm are not drawn like
those to come.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest

from apt_ray.data.feedback import MOST_AT_ONCE, Entry, Feedback, FeedbackStore, Judgement
from apt_ray.detection.prompt_set import UsedFeedback
from apt_ray.errors import DataError, RegistryError
from apt_ray.features.clip import load_backbone
from apt_ray.files import file_sha256
from apt_ray.registry.acceptance import (
    Accepted,
    LoadBackbone,
    accept_false_alarms,
    calibrate_further,
)
from apt_ray.registry.protocol import CHAMPION, Registry

MOST_DEFECTS = 64
"""Confirmed defects that a new version is held against."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """False alarms that may join the memory, and those that may not.

    Attributes:
        alarms: those that may.
        passed_over: ids of what may not, each with the reason.
    """

    alarms: tuple[Feedback, ...]
    passed_over: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class UsedFeedbacks:
    """What came of feedback.

    Attributes:
        accepted: what became of the version.
        given: what was used, or was to be, in the order of `accepted`.
        defects: the confirmed defects that it was held against.
        passed_over: ids of what may not be used, each with the reason.
    """

    accepted: Accepted
    given: tuple[Feedback, ...]
    defects: tuple[Feedback, ...]
    passed_over: tuple[tuple[str, str], ...]


def accept_feedback(
    registry: Registry,
    store: FeedbackStore,
    category: str,
    *,
    why: str,
    ids: Sequence[str] = (),
    most: int = MOST_AT_ONCE,
    callers: int = 1,
    force: bool = False,
    serve: bool = False,
    dry_run: bool = False,
    load: LoadBackbone = load_backbone,
) -> UsedFeedbacks:
    """Let false alarms that people reported join the champion's memory, as `accept_false_alarms`.

    Args:
        store: what people said.
        ids: which of it; empty takes all that is not used yet, those first that scored lowest.
        most: how many at most.
        callers: how many must agree that a part is good.
        why, force, serve, dry_run, load: as of `accept_false_alarms`.

    Raises:
        RegistryError: nothing may be used.
        GateError, PromptSetError, RegistryConflictError: as of `accept_false_alarms`.
        DataError: the store cannot be read.
    """
    champion, _ = registry.load(category, CHAMPION)
    taken = {each.id for each in champion.provenance.feedback if each.use == "memory"}
    chosen = choose_false_alarms(store, category, taken=taken, ids=ids, most=most, callers=callers)
    if not chosen.alarms:
        reasons = "; ".join(f"{identifier}: {reason}" for identifier, reason in chosen.passed_over)
        raise RegistryError(
            f"no false alarm of {category} can join the memory ({reasons or 'none was reported'}):"
            " have some reported, or name others"
        )
    defects = confirmed_defects(store, category)
    accepted = accept_false_alarms(
        registry,
        category,
        [store.path(alarm) for alarm in chosen.alarms],
        why=why,
        defects=[store.path(defect) for defect in defects],
        used=[_used(alarm, "memory") for alarm in chosen.alarms],
        force=force,
        serve=serve,
        dry_run=dry_run,
        load=load,
    )
    return UsedFeedbacks(
        accepted=accepted,
        given=chosen.alarms,
        defects=tuple(defects),
        passed_over=chosen.passed_over,
    )


def calibrate_by_samples(
    registry: Registry,
    store: FeedbackStore,
    category: str,
    *,
    why: str,
    force: bool = False,
    dry_run: bool = False,
    load: LoadBackbone = load_backbone,
) -> UsedFeedbacks:
    """State the threshold anew by the good parts of random samples, as `calibrate_further`.

    A sample counts once something undisputed is said of every image of it, for the version that
    inspected it, and once. Its scores are those of the inspections: of the very images.

    Raises:
        RegistryError: no sample counts.
        GateError, DataError: as of `accept_feedback`.
    """
    champion, version = registry.load(category, CHAMPION)
    taken = champion.provenance.feedback
    known = {each.id for each in taken if each.use == "calibration"}
    remembered = {_request(each.id) for each in taken if each.use == "memory"}
    judged = store.judgements(category)
    used: list[Feedback] = []
    passed_over: list[tuple[str, str]] = []
    for name, entries in store.samples(category).items():
        drawn = [found for entry in entries if (found := store.find(category, entry.id))]
        truths = [
            judged[entry.request].truth if entry.request in judged else None for entry in entries
        ]
        if reason := _why_not(drawn, truths, version.version, known, remembered):
            passed_over.append((name, reason))
            continue
        used += [each for each, truth in zip(drawn, truths, strict=True) if truth == "good"]
    if not used:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over)
        raise RegistryError(
            f"no sample calibrates {category} ({reasons or 'none was drawn'}): draw one, and say"
            " something of each of its images"
        )
    defects = confirmed_defects(store, category)
    accepted = calibrate_further(
        registry,
        category,
        [each.score for each in used if each.score is not None],
        why=why,
        defects=[store.path(defect) for defect in defects],
        used=[_used(each, "calibration") for each in used],
        force=force,
        dry_run=dry_run,
        load=load,
    )
    return UsedFeedbacks(
        accepted=accepted,
        given=tuple(used),
        defects=tuple(defects),
        passed_over=tuple(passed_over),
    )


def choose_false_alarms(
    store: FeedbackStore,
    category: str,
    *,
    taken: Collection[str] = (),
    ids: Sequence[str] = (),
    most: int = MOST_AT_ONCE,
    callers: int = 1,
) -> Chosen:
    """The false alarms that may join the memory; args as of `accept_feedback`.

    Args:
        taken: ids of what the champion's memory has already.
    """
    judgements = store.judgements(category)
    by_id = {entry.id: each for each in judgements.values() for entry in each.entries}
    passed_over = [(each, "unknown") for each in ids if each not in by_id]
    wanted = [by_id[each] for each in ids if each in by_id] if ids else list(judgements.values())
    remembered = {_request(each) for each in taken}
    said: list[list[Feedback]] = []
    for judgement in dict.fromkeys(wanted):
        newest = judgement.entries[0]
        if reason := _why_no_alarm(judgement, remembered, callers):
            # Of what was not named, what is no false alarm goes without saying.
            if ids or any(entry.label == "false_alarm" for entry in judgement.entries):
                passed_over.append((newest.id, reason))
            continue
        if records := _records(store, category, judgement.entries):
            said.append(records)
    # The lowest first: what scores highest is the likeliest to be a defect after all.
    said.sort(key=lambda records: 1.0 if records[0].score is None else records[0].score)
    found: list[Feedback] = []
    for records in said:
        if len(found) == most:
            break
        alarm = _unchanged(store, records)
        if alarm is None:
            passed_over.append((records[0].id, "its image is not what was given"))
        elif alarm.sha256 not in {each.sha256 for each in found}:
            found.append(alarm)
    return Chosen(alarms=tuple(found), passed_over=tuple(passed_over))


def confirmed_defects(store: FeedbackStore, category: str) -> list[Feedback]:
    """The newest images that somebody says to show defects, whatever others say: nobody can take
    another's out of the gate, nor crowd them out, since callers take turns."""
    of_caller: dict[str, list[list[Entry]]] = defaultdict(list)
    for judgement in store.judgements(category).values():
        if bad := [entry for entry in judgement.entries if entry.truth == "defective"]:
            of_caller[bad[0].caller].append(bad)
    found: list[Feedback] = []
    for turn in zip_longest(*of_caller.values()):
        for bad in filter(None, turn):
            image = _unchanged(store, _records(store, category, bad))
            if image is not None and len(found) < MOST_DEFECTS:
                found.append(image)
        if len(found) == MOST_DEFECTS:
            break
    return found


def _records(store: FeedbackStore, category: str, entries: Sequence[Entry]) -> list[Feedback]:
    """What was said of one request, first what has the fleet's own image, and the oldest of that.

    Args:
        entries: newest first.
    """
    found = [each for entry in reversed(entries) if (each := store.find(category, entry.id))]
    return sorted(found, key=lambda each: each.source != "history")


def _unchanged(store: FeedbackStore, records: Sequence[Feedback]) -> Feedback | None:
    """The first whose image is what was given; None if there is none."""
    for each in records:
        with suppress(DataError):
            if file_sha256(store.path(each)) == each.sha256:
                return each
    return None


def _why_no_alarm(judgement: Judgement, remembered: Collection[str], callers: int) -> str:
    if judgement.truth is None:
        return "callers disagree"
    if judgement.truth != "good" or all(e.label != "false_alarm" for e in judgement.entries):
        return "nobody calls it a false alarm"
    if judgement.entries[0].request in remembered:
        return "the memory has it already"
    if judgement.callers < callers:
        return f"{judgement.callers} of {callers} callers say so"
    return ""


def _why_not(
    drawn: Sequence[Feedback],
    truths: Sequence[str | None],
    version: int,
    known: Collection[str],
    remembered: Collection[str],
) -> str:
    """Why a sample does not count; empty if it does."""
    if not drawn or len(drawn) != drawn[0].sample_size or len(drawn) != len(truths):
        return "images of it are missing"
    if unjudged := truths.count(None):
        return f"{unjudged} of its {len(drawn)} images are not judged, or callers disagree"
    if drawn[0].version != version:
        return f"version {drawn[0].version} inspected it, and version {version} serves"
    if any(each.id in known for each in drawn):
        return "it counts already"
    if any(_request(each.id) in remembered for each in drawn):
        return "the memory has learned from images of it"
    return ""


def _request(identifier: str) -> str:
    """The digest of the request in an id."""
    return identifier.rsplit("-", 2)[-2]


def _used(given: Feedback, use: str) -> UsedFeedback:
    return UsedFeedback.model_validate(
        {"id": given.id, "by": given.by, "sha256": given.sha256, "use": use}
    )
