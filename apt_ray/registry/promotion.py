"""Whether a candidate may become the champion, the report of it, and the way back."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from PIL import Image

from apt_ray.data.distinct import pixel_digest
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import PromptSetError, RegistryError
from apt_ray.files import AnyPath, file_sha256
from apt_ray.images import read_image
from apt_ray.registry.contents import DATA, HELD_OUT
from apt_ray.registry.history import Move
from apt_ray.registry.protocol import CANDIDATE, CHAMPION, RegisteredVersion, Registry
from apt_ray.tables import markdown
from apt_ray.validation.versions import (
    MAX_FAMILY_LOSS,
    MIN_STANDARD_ERRORS,
    VersionComparison,
    compare_prompt_sets,
)

_MOST_IMAGES = 16
_GATED, _GATE, _GATE_WHY = "gated_against", "gate", "gate_why"

Verdict = Literal["promoted", "kept", "uncomparable"]

Compare = Callable[[PromptSet, PromptSet, Sequence[Image.Image]], VersionComparison]
"""Judges a candidate and a champion on normal images."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Promotion:
    """What came of an attempt to promote.

    Attributes:
        candidate: the version that was to become the champion.
        champion: the version that served, None if none did.
        verdict: what the comparison says, whether or not it was followed.
        why: the verdict in words.
        comparison: the figures, None if there are none.
        forced: the reason given for promoting in any case.
        move: the move that was made, None if the champion stays.
    """

    category: str
    candidate: int
    champion: int | None
    verdict: Verdict
    why: str
    comparison: VersionComparison | None = None
    forced: str | None = None
    move: Move | None = None

    def tags(self) -> dict[str, str]:
        """The tags of the candidate's version."""
        tags: dict[str, str] = {"verdict": self.verdict}
        if self.comparison is not None:
            tags["difference"] = (
                f"{self.comparison.difference:+.4f} ± {self.comparison.standard_error:.4f}"
            )
            tags["validation_values"] = (
                f"{self.comparison.candidate_SF.mean():.4f} against"
                f" {self.comparison.champion_SF.mean():.4f} of version {self.champion}"
            )
            tags["judged_on"] = f"{self.comparison.images} images against version {self.champion}"
        if self.forced is not None:
            tags["forced"] = self.forced
        return tags

    def report(self) -> str:
        """The decision as Markdown."""
        opponent = "no champion" if self.champion is None else f"champion {self.champion}"
        lines = [
            f"### Promotion: version {self.candidate} of {self.category} against {opponent}:"
            f" {self.verdict}",
            "",
            f"{self.why[:1].upper()}{self.why[1:]}.",
        ]
        if self.forced is not None:
            lines += ["", f"Promoted in any case: {self.forced}"]
        if self.comparison is not None:
            lines += ["", _table(self.comparison)]
        if self.move is not None:
            lines += ["", f"Moved by {self.move.who} at {self.move.at}."]
        return "\n".join(lines)


def promote(
    registry: Registry,
    category: str,
    reference: str = CANDIDATE,
    *,
    normal: Sequence[AnyPath] = (),
    force: str | None = None,
    why: str = "",
    compare: Compare = compare_prompt_sets,
) -> Promotion:
    """Make a version the champion if it beats the one that is; the decision is kept with it.

    Both are judged on the same perturbed images, made from the normal ones that were kept with
    either version, and from `normal`, as far as neither was fitted to them. Without a champion,
    the version becomes the first.

    A version that was kept on more images, against the same champion, stays kept on fewer. One that
    was made of this champion by what people said of its images is judged by its gate alone.

    Args:
        normal: Files of further normal images.
        force: The reason for promoting it whatever the verdict is.
        why: Who asks for it and why; kept with the move, before the verdict.
        compare: Judges the two on normal images; a caller may do that elsewhere, or watch it.

    Raises:
        RegistryConflictError: Somebody else moved the champion meanwhile; nothing was changed.
        RegistryError: The version serves already, or does not exist.
    """
    history = registry.history(category)
    candidate = registry.resolve(category, reference)
    if candidate.version == history.champion:
        raise RegistryError(
            f"version {candidate.version} of {category} is the champion already: register a new"
            " one, or name another version"
        )
    promotion = Promotion(
        category=category,
        candidate=candidate.version,
        champion=history.champion,
        verdict="promoted",
        why="there was no champion",
        forced=force,
    )
    if history.champion is not None:
        champion = registry.resolve(category, str(history.champion))
        promotion = _by_gate(promotion, candidate) or _judge(
            registry, promotion, candidate, champion, normal, compare
        )
    if promotion.verdict == "promoted" or force is not None:
        verdict = promotion.why if force is None else f"forced: {force} ({promotion.why})"
        move = registry.move(
            history,
            candidate.version,
            action="promote",
            why=f"{why}: {verdict}" if why else verdict,
        )
        promotion = replace(promotion, move=move)
    registry.annotate(
        candidate,
        promotion.tags(),
        report=promotion.report(),
        name=f"promotion-after-{history.recorded}-moves",
    )
    return promotion


def gate_tags(champion: int, *, passes: bool, why: str) -> dict[str, str]:
    """The tags of a version that was made of a champion, by which it is promoted or kept."""
    return {
        _GATED: str(champion),
        _GATE: "promoted" if passes else "kept",
        _GATE_WHY: why,
    }


def _by_gate(promotion: Promotion, candidate: RegisteredVersion) -> Promotion | None:
    """What the candidate's gate says; None if it has none against this champion."""
    tags = candidate.tags
    if tags.get(_GATED) != str(promotion.champion):
        return None
    verdict: Verdict = "promoted" if tags.get(_GATE) == "promoted" else "kept"
    return replace(promotion, verdict=verdict, why=tags.get(_GATE_WHY, ""))


def roll_back(registry: Registry, category: str, *, why: str = "") -> Move:
    """Let the version serve that served before; a second time goes one further.

    Versions that were deleted since are passed over.

    Raises:
        RegistryConflictError: Somebody else moved the champion meanwhile; nothing was changed.
        RegistryError: Nothing served before.
    """
    history = registry.history(category)
    present = set(registry.versions(category))
    target = next((version for version in history.earlier() if version in present), None)
    if target is None:
        raise RegistryError(
            f"no version of {category} served before version {history.champion}: there is nothing"
            " to roll back to; promote another version instead"
        )
    return registry.move(history, target, action="rollback", why=why or "no reason given")


def discard(registry: Registry, category: str, *, why: str) -> RegisteredVersion:
    """Take the alias `candidate` from a version that shall not serve; it stays in the registry.

    Returns the version, with the reason among its tags.

    Raises:
        RegistryConflictError: Another version became the candidate meanwhile; nothing was changed.
        RegistryError: There is no candidate, or it is the champion.
    """
    candidate = registry.resolve(category, CANDIDATE)
    if CHAMPION in candidate.aliases:
        raise RegistryError(
            f"version {candidate.version} of {category} is the champion, and no other waits: there"
            " is nothing to discard; roll back, or promote another version instead"
        )
    registry.withdraw(category, candidate.version)
    registry.annotate(
        candidate,
        {"discarded": why},
        report=f"### Discarded: version {candidate.version} of {category}\n\n{why}",
        name="discarded",
    )
    return registry.resolve(category, str(candidate.version))


def _judge(
    registry: Registry,
    promotion: Promotion,
    candidate: RegisteredVersion,
    champion: RegisteredVersion,
    normal: Sequence[AnyPath],
    compare: Compare,
) -> Promotion:
    sides = [_Side.of(registry, candidate)]
    try:
        sides.append(_Side.of(registry, champion))
    except PromptSetError as error:  # of an earlier score rule, say: it must not bar its successor
        return replace(promotion, verdict="uncomparable", why=f"the champion cannot score: {error}")
    reason = next((side.reason for side in sides if side.reason), None)
    images: list[Image.Image] = []
    reading = sides[0].prompt_set.reading
    other = sides[-1].prompt_set.reading
    if (reading.white_level, reading.ground) != (other.white_level, other.ground):
        reason = reason or (
            f"they read files differently: white at {reading.white_level} on {reading.ground}, and"
            f" at {other.white_level} on {other.ground}; promote one by hand"
        )
    if reason is None:
        found = {file: image for side in sides for file, image in side.held_out.items()}
        pixels = {file: digest for side in sides for file, digest in side.pixels.items()}
        for path in normal:
            file = file_sha256(path)
            found[file] = read_image(path, reading)
            pixels[file] = pixel_digest(found[file])
        # Of a file that only a version from before knows, its own digest stands for its pixels'.
        fitted = {pixels.get(file, file) for side in sides for file in side.support}
        fitted |= {file for side in sides for file in side.support}
        distinct = {
            pixels.get(file, file): image for file, image in found.items() if file not in fitted
        }
        images = [image for digest, image in sorted(distinct.items()) if digest not in fitted]
        if not images:
            reason = (
                "there is no normal image that is in neither support set: name a folder with"
                " more normal images (--data)"
            )
    if reason is not None:
        return replace(promotion, verdict="uncomparable", why=reason)
    images = images[:_MOST_IMAGES]
    if (kept_on := _kept_on(candidate.tags, champion.version)) > len(images):
        why = (
            f"it was kept before, on {kept_on} normal images that neither was fitted to, and fewer,"
            f" {len(images)}, do not overrule that: name a folder with more (--data)"
        )
        return replace(promotion, verdict="kept", why=why)
    comparison = compare(sides[0].prompt_set, sides[1].prompt_set, images)
    return replace(
        promotion,
        verdict=comparison.verdict,
        why=explain(comparison),
        comparison=comparison,
    )


def _kept_on(tags: Mapping[str, str], champion: int) -> int:
    """How many images the last verdict was given on, if it was to keep this champion; else 0."""
    images, _, opponent = tags.get("judged_on", "").partition(" images against version ")
    return int(images) if tags.get("verdict") == "kept" and opponent == str(champion) else 0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Side:
    """One of two versions that are compared.

    Attributes:
        support: digests of the files that it was fitted to.
        held_out: digest of a file -> normal image that it was not fitted to.
        pixels: digest of a file -> of its pixels; empty in versions from before these were kept.
        reason: why it cannot be compared, if so.
    """

    prompt_set: PromptSet
    support: frozenset[str]
    held_out: dict[str, Image.Image]
    pixels: dict[str, str]
    reason: str | None

    @classmethod
    def of(cls, registry: Registry, registered: RegisteredVersion) -> "_Side":
        prompt_set, _ = registry.load(registered.category, str(registered.version))
        support: frozenset[str] = frozenset()
        held_out: dict[str, Image.Image] = {}
        pixels: dict[str, str] = {}
        reason = None
        with tempfile.TemporaryDirectory(prefix="apt-ray-") as name:
            data = registry.download(registered, DATA, Path(name))
            if data is None:
                reason = f"version {registered.version} does not say which images it was fitted to"
            else:
                said = json.loads(data.read_text())
                support, pixels = frozenset(said["support"].values()), said.get("pixels", {})
                folder = registry.download(registered, HELD_OUT, Path(name))
                files = sorted(folder.glob("*.png")) if folder else []
                held_out = {path.stem: read_image(path) for path in files}
        return cls(
            prompt_set=prompt_set,
            support=support,
            held_out=held_out,
            pixels=pixels,
            reason=reason,
        )


def explain(comparison: VersionComparison) -> str:
    """The verdict of a comparison in words, with its numbers."""
    family, loss = comparison.worst_family
    gain = (
        f"validation value {comparison.difference:+.4f} ± {comparison.standard_error:.4f} (standard"
        f" error) on {comparison.images} normal images that neither was fitted to"
    )
    if comparison.verdict == "promoted":
        return f"{gain}: better by more than {MIN_STANDARD_ERRORS:g} standard errors"
    if loss < -MAX_FAMILY_LOSS:
        return f"{gain}: {family} is {-100 * loss:.1f} points worse"
    return f"{gain}: not better by more than {MIN_STANDARD_ERRORS:g} standard errors"


def _table(comparison: VersionComparison) -> str:
    names = [*comparison.families, "all"]
    sides = [
        [*values_SF.mean(0), values_SF.mean()]
        for values_SF in (comparison.candidate_SF, comparison.champion_SF)
    ]
    return markdown(
        ("perturbation", "candidate", "champion", "difference"),
        [
            (name, f"{new:.4f}", f"{old:.4f}", f"{new - old:+.4f}")
            for name, new, old in zip(names, *sides, strict=True)
        ],
    )
