"""Confirmed defects teach what serves their kinds, as a new version, one `rollback` away."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from apt_ray.data.folders import Defect
from apt_ray.features.clip import load_backbone
from apt_ray.features.protocol import Backbone
from apt_ray.prompts.confirm import Confirmation, confirm
from apt_ray.registry.acceptance import unmoved_history
from apt_ray.registry.history import Move
from apt_ray.registry.protocol import CHAMPION, Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class Confirmed:
    """What came of it.

    Attributes:
        confirmation: the new prompt set, and what it says of the images.
        source, version: the version that served, and the one that serves now.
        move: of the champion.
    """

    confirmation: Confirmation
    source: int
    version: int
    move: Move


def confirm_defects(
    registry: Registry,
    category: str,
    defects: Sequence[Defect],
    *,
    why: str,
    load: Callable[..., Backbone] = load_backbone,
) -> Confirmed:
    """Let the champion name kinds of defects by confirmed ones, and let that serve.

    Its scores and its threshold stay what they were.

    Args:
        defects: each of a kind.
        why: kept with the move.
        load: gives the backbone of a spec.

    Raises:
        DataError: as `apt_ray.prompts.confirm.confirm`; nothing was changed.
        RegistryError: the champion is moved while it is read.
        RegistryConflictError: Somebody else moved the champion meanwhile; the new version waits as
            candidate.
    """
    prompt_set, source = registry.load(category, CHAMPION)
    history = unmoved_history(registry, source)
    confirmation = confirm(prompt_set, defects, load(prompt_set.backbone))
    counts = Counter(defect.kind for defect in defects)
    said = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    registered = registry.register(
        confirmation.prompt_set,
        pictures={},
        trials=[],
        tags={"confirmed": f"{said}, of version {source.version}"},
        inherit=source,
        promote=False,
    )
    move = registry.move(
        history,
        registered.version,
        action="confirm",
        why=f"{why}: confirmed defects of version {source.version}: {said}",
    )
    return Confirmed(
        confirmation=confirmation, source=source.version, version=registered.version, move=move
    )
