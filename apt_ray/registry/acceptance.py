"""False alarms join the memory of what serves, as a new version, one `rollback` away."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import GateError, RegistryError
from apt_ray.features.clip import load_backbone
from apt_ray.features.protocol import Backbone
from apt_ray.files import AnyPath
from apt_ray.images import read_image
from apt_ray.prompts.accept import Acceptance, accept
from apt_ray.registry.history import History, Move
from apt_ray.registry.protocol import CHAMPION, RegisteredVersion, Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """What came of it.

    Attributes:
        acceptance: the new prompt set, and the scores of the images before and after.
        source, version: the version that served, and the one that serves now.
        defects: anomaly scores of the confirmed defects, before and after.
        move: of the champion.
    """

    acceptance: Acceptance
    source: int
    version: int
    defects: tuple[tuple[float, float], ...]
    move: Move


def accept_false_alarms(
    registry: Registry,
    category: str,
    images: Sequence[AnyPath],
    *,
    why: str,
    defects: Sequence[AnyPath] = (),
    force: bool = False,
    load: Callable[..., Backbone] = load_backbone,
) -> Accepted:
    """Let images of good parts that the champion rejects join its memory, and let that serve.

    The threshold stays; a certified false-alarm rate still holds, since no score can rise.

    Args:
        images: files of good parts.
        why: kept with the move.
        defects: files of confirmed defects: what the champion rejects of them must stay rejected.
        force: let it serve even so.
        load: gives the backbone of a spec.

    Raises:
        GateError: a confirmed defect would pass; nothing was changed.
        PromptSetError: the memory has taken as many as it may.
        RegistryConflictError: somebody else moved the champion meanwhile; the new version waits as
            candidate.
    """
    history, prompt_set, source = champion_of(registry, category)
    backbone = load(prompt_set.backbone)
    shown = [read_image(path, prompt_set.reading) for path in images]
    acceptance = accept(prompt_set, shown, backbone)
    pairs = _scores(
        [read_image(path, prompt_set.reading) for path in defects],
        [Detector(backbone, one) for one in (prompt_set, acceptance.prompt_set)],
    )
    rejects = prompt_set.threshold.rejects
    passing = [
        str(path)
        for path, (before, after) in zip(defects, pairs, strict=True)
        if rejects(before) and not rejects(after)
    ]
    if passing and not force:
        raise GateError(
            f"with these images in its memory {category} would no longer reject"
            f" {', '.join(passing)}: leave out what shows defects, or force it"
        )
    registered = registry.register(
        acceptance.prompt_set,
        pictures={},
        trials=[],
        tags={"accepted": f"{len(images)} false alarms of version {source.version}"},
        support=images,
        inherit=source,
        promote=False,
    )
    move = registry.move(
        history,
        registered.version,
        action="accept",
        why=f"{why}: {len(images)} false alarms of version {source.version} accepted",
    )
    return Accepted(
        acceptance=acceptance,
        source=source.version,
        version=registered.version,
        defects=pairs,
        move=move,
    )


def champion_of(registry: Registry, category: str) -> tuple[History, PromptSet, RegisteredVersion]:
    """How the champion came to be that, its prompt set, and which version it is; RegistryError if
    it is moved in between."""
    history = registry.history(category)
    prompt_set, source = registry.load(category, CHAMPION)
    if history.champion != source.version:
        raise RegistryError(f"the champion of {category} has just been moved: try again")
    return history, prompt_set, source


def _scores(
    images: Sequence[Image.Image], detectors: Sequence[Detector]
) -> tuple[tuple[float, float], ...]:
    """Anomaly scores of images by two detectors of one backbone, before and after."""
    if not images:
        return ()
    backbone = detectors[0].backbone
    features = backbone.encode_in_batches(backbone.preprocess(images))
    before, after = (detector.score(features)[1].tolist() for detector in detectors)
    return tuple(zip(before, after, strict=True))
