"""What people say of inspected images becomes a version: false alarms join the memory, confirmed
good parts calibrate the threshold.

Confirmed defects are the gate: what the champion rejects of them must stay rejected. A version that
was made so is judged by its gate when it is promoted: it differs from the champion in nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from apt_ray.detection.calibration import Threshold, calibrate
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet, UsedFeedback
from apt_ray.errors import GateError, RegistryError
from apt_ray.features.clip import load_backbone
from apt_ray.features.protocol import Backbone
from apt_ray.files import AnyPath, location
from apt_ray.images import read_image
from apt_ray.prompts.accept import Acceptance, accept
from apt_ray.registry.history import History, Move
from apt_ray.registry.promotion import gate_tags
from apt_ray.registry.protocol import CHAMPION, RegisteredVersion, Registry
from apt_ray.tables import markdown

LoadBackbone = Callable[..., Backbone]
"""Gives the backbone of a spec."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """What a change does to the threshold, and to the verdicts on images that people confirmed.

    Attributes:
        before, after: the thresholds.
        alarms: anomaly scores of the false alarms, before and after.
        defects: of the confirmed defects.
    """

    before: Threshold
    after: Threshold
    alarms: tuple[tuple[float, float], ...]
    defects: tuple[tuple[float, float], ...]

    @property
    def passing(self) -> tuple[int, ...]:
        """The places of the confirmed defects that were rejected and would pass."""
        return tuple(
            place
            for place, (old, new) in enumerate(self.defects)
            if self.before.rejects(old) and not self.after.rejects(new)
        )

    @property
    def why(self) -> str:
        """The verdict in words, with its numbers."""
        defects = (
            f"of {len(self.defects)} confirmed defects"
            f" {_rejected(self.before, [old for old, _ in self.defects])} were rejected and"
            f" {_rejected(self.after, [new for _, new in self.defects])} are"
            if self.defects
            else "no confirmed defect speaks for or against it"
        )
        alarms = (
            f"; of {len(self.alarms)} false alarms"
            f" {_rejected(self.after, [new for _, new in self.alarms])} are still rejected"
            if self.alarms
            else ""
        )
        return f"{defects}{alarms}; threshold {_said(self.before)}, then {_said(self.after)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """What came of accepting or calibrating.

    Attributes:
        gate: what it does to confirmed images.
        source: the version that served.
        version: the new version; None if it was only tried.
        move: of the champion, if it serves at once.
        acceptance: the scores of the images that were to join; None of a calibration.
    """

    gate: Gate
    source: int
    version: int | None = None
    move: Move | None = None
    acceptance: Acceptance | None = None


def accept_false_alarms(
    registry: Registry,
    category: str,
    images: Sequence[AnyPath],
    *,
    why: str,
    defects: Sequence[AnyPath] = (),
    used: Sequence[UsedFeedback] = (),
    force: bool = False,
    serve: bool = True,
    dry_run: bool = False,
    load: LoadBackbone = load_backbone,
) -> Accepted:
    """Let images of good parts that the champion rejects join its memory, as a new version.

    No score can rise by it, so a certified false-alarm rate still holds; an estimated threshold
    follows. An image with which a confirmed defect would pass is left out.

    Args:
        images: files of good parts.
        why: kept with the move.
        defects: files of confirmed defects: what the champion rejects of them must stay rejected.
        used: what was said of each image, where that is known; kept with the version.
        force: let all of them join, whatever becomes of the defects.
        serve: whether it is the champion at once, or waits as candidate.
        dry_run: only say what would come of it.
        load: gives the backbone of a spec.

    Raises:
        GateError: none can join without a confirmed defect passing; nothing was changed.
        PromptSetError: the memory has taken as many as it may.
        RegistryConflictError: somebody else moved the champion meanwhile; the new version waits as
            candidate.
    """
    base = _Base.of(registry, category)
    backbone = load(base.prompt_set.backbone)
    acceptance = accept(
        base.prompt_set,
        base.read(images),
        backbone,
        defects=base.read(defects),
        decided=base.decided,
        force=force,
    )
    if not acceptance.joined:
        blocking = sorted({place for each in acceptance.blocked for place in each})
        raise GateError(
            f"with these images in its memory {category} would no longer reject"
            f" {', '.join(str(defects[place]) for place in blocking)}: leave out what shows"
            " defects, or force it"
        )
    gate = Gate(
        before=base.decided or base.prompt_set.threshold,
        after=base.decided or acceptance.prompt_set.threshold,
        alarms=tuple(zip(acceptance.before, acceptance.after, strict=True)),
        defects=acceptance.defects,
    )
    found = Accepted(gate=gate, source=base.version.version, acceptance=acceptance)
    if dry_run:
        return found
    joined = [images[place] for place in acceptance.joined]
    said = [used[place] for place in acceptance.joined] if used else []
    return base.register(
        registry,
        found,
        acceptance.prompt_set,
        said,
        what=f"{len(joined)} false alarms of version {base.version.version} accepted",
        why=why,
        support=joined,
        serve=serve,
    )


def calibrate_further(
    registry: Registry,
    category: str,
    scores: Sequence[float],
    *,
    why: str,
    defects: Sequence[AnyPath] = (),
    used: Sequence[UsedFeedback] = (),
    force: bool = False,
    dry_run: bool = False,
    load: LoadBackbone = load_backbone,
) -> Accepted:
    """State the champion's threshold anew, by the scores that it gave to further good parts, as a
    new version that waits as candidate.

    They join the calibration scores that it has; scores of left-out support images, which certify
    nothing, they replace. The certificate is that of `calibrate`, and needs what that needs: good
    parts that were drawn as those to come are, whatever their scores.

    Args:
        scores: anomaly scores of good parts by the champion, which it has not learned from.
        defects, why, used, force, dry_run, load: as of `accept_false_alarms`.

    Raises:
        GateError: a confirmed defect would pass; nothing was changed.
        RegistryError: there is no score.
    """
    base = _Base.of(registry, category)
    if not scores:
        raise RegistryError(
            f"no further good part calibrates {category}: draw a sample and judge it"
        )
    old = base.prompt_set.threshold
    known = old.scores if old.source == "calibration images" else ()
    new = calibrate([*known, *scores], base.prompt_set.settings.false_alarm_rate)
    changed = base.prompt_set.with_threshold(new)
    found = _scores(Detector(load(base.prompt_set.backbone), changed), base.read(defects))
    gate = Gate(
        before=base.decided or old,
        after=base.decided or new,
        alarms=(),
        defects=tuple(zip(found, found, strict=True)),
    )
    if gate.passing and not force:
        raise GateError(
            f"at {_said(new)} instead of {_said(old)} {category} would no longer reject"
            f" {', '.join(str(defects[place]) for place in gate.passing)}: look at them, or force"
            " it"
        )
    accepted = Accepted(gate=gate, source=base.version.version)
    if dry_run:
        return accepted
    return base.register(
        registry,
        accepted,
        changed,
        used,
        what=f"calibrated by {len(scores)} further good parts of version {base.version.version}",
        why=why,
        support=(),
        serve=False,
    )


def unmoved_history(registry: Registry, champion: RegisteredVersion) -> History:
    """How a version became champion; RegistryError if it no longer is."""
    history = registry.history(champion.category)
    if history.champion != champion.version:
        raise RegistryError(f"the champion of {champion.category} has just been moved: try again")
    return history


def report(accepted: Accepted, names: Sequence[str], defects: Sequence[str]) -> str:
    """The verdict as Markdown: `names` of the images, and of the confirmed defects."""
    gate = accepted.gate
    lines = [f"{gate.why[:1].upper()}{gate.why[1:]}."]
    if accepted.acceptance is not None:
        rows = [
            (
                name,
                f"{old:.3f}",
                f"{new:.3f}",
                ("stays rejected" if gate.after.rejects(new) else "passes")
                if not blocked
                else f"left out: {', '.join(defects[place] for place in blocked)} would pass",
            )
            for name, (old, new), blocked in zip(
                names, gate.alarms, accepted.acceptance.blocked, strict=True
            )
        ]
        lines += ["", markdown(("false alarm", "before", "after", ""), rows)]
    if gate.defects:
        rows = [
            (
                name,
                f"{old:.3f}",
                f"{new:.3f}",
                f"{_verdict(gate.before, old)}, then {_verdict(gate.after, new)}",
            )
            for name, (old, new) in zip(defects, gate.defects, strict=True)
        ]
        lines += ["", markdown(("confirmed defect", "before", "after", ""), rows)]
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Base:
    """The champion that is changed.

    Attributes:
        decided: the threshold that an operator has set above its own.
    """

    prompt_set: PromptSet
    version: RegisteredVersion
    decided: Threshold | None

    @classmethod
    def of(cls, registry: Registry, category: str) -> "_Base":
        prompt_set, version = registry.load(category, CHAMPION)
        said = registry.categories()[category].threshold
        decided = None
        if said is not None and said.value is not None:
            decided = prompt_set.threshold.moved_to(said.value)
        return cls(prompt_set=prompt_set, version=version, decided=decided)

    def read(self, paths: Sequence[AnyPath]) -> list[Image.Image]:
        return [read_image(path, self.prompt_set.reading) for path in paths]

    def register(
        self,
        registry: Registry,
        found: Accepted,
        changed: PromptSet,
        used: Sequence[UsedFeedback],
        *,
        what: str,
        why: str,
        support: Sequence[AnyPath],
        serve: bool,
    ) -> Accepted:
        """The new version, which knows all images of the champion, and waits or serves."""
        history = unmoved_history(registry, self.version)
        provenance = changed.provenance
        feedback = (*provenance.feedback, *used)
        callers = sorted({each.by or "whoever has no token" for each in used})
        registered = registry.register(
            replace(changed, provenance=provenance.model_copy(update={"feedback": feedback})),
            pictures={},
            trials=[],
            tags={
                "accepted": what,
                **({"feedback_by": ", ".join(callers)} if callers else {}),
                **gate_tags(found.source, passes=not found.gate.passing, why=found.gate.why),
            },
            support=[location(path) for path in support],
            inherit=self.version,
            promote=False,
        )
        move = None
        if serve:
            move = registry.move(history, registered.version, action="accept", why=f"{why}: {what}")
        return replace(found, version=registered.version, move=move)


def _scores(detector: Detector, images: Sequence[Image.Image]) -> list[float]:
    if not images:
        return []
    backbone = detector.backbone
    features = backbone.encode_in_batches(backbone.preprocess(images))
    return [float(score) for score in detector.score(features)[1]]


def _rejected(threshold: Threshold, scores: Sequence[float]) -> int:
    return sum(map(threshold.rejects, scores))


def _verdict(threshold: Threshold, score: float) -> str:
    return "rejected" if threshold.rejects(score) else "passes"


def _said(threshold: Threshold) -> str:
    rate = threshold.certified_false_alarm_rate
    certified = "certifies nothing" if rate is None else f"certifies {100 * rate:g} %"
    return f"{threshold.value:.3f} ({certified}, {len(threshold.scores)} {threshold.source})"
