"""Where a search begins beside the defaults: at the settings of the registry's champions."""

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

from apt_ray.errors import PromptSetError
from apt_ray.registry import Registry
from tuning.settings import SearchSettings
from tuning.space import REFERENCE, point_of, starting_point

_MOST_LOADED = 64
"""Champions of other categories that are loaded: a registry may hold thousands."""


def past_settings(
    registry: Registry, categories: Sequence[str], settings: SearchSettings
) -> dict[str, tuple[dict[str, Any], ...]]:
    """Category -> at most `settings.warm_start` points of the space that champions were fitted
    with.

    That of the category's own champion comes first, then those of all, the commonest first. A
    champion of another encoder or score rule says nothing, nor does one that has the defaults or
    a value that the space does not hold.

    Raises:
        RegistryError: the registry does not answer.
    """
    champions = registry.champions()
    own = [name for name in categories if name in champions]
    others = [name for name in champions if name not in set(own)][:_MOST_LOADED]
    points = {
        name: tuple(sorted(point.items()))
        for name in (*own, *others)
        if (point := _point(registry, name, settings)) is not None
    }
    commonest = [point for point, _ in Counter(points.values()).most_common()]
    found = {}
    for name in categories:
        best_first = dict.fromkeys([points[name], *commonest] if name in points else commonest)
        found[name] = tuple(map(dict, islice(best_first, settings.warm_start)))
    return found


def _point(registry: Registry, category: str, settings: SearchSettings) -> dict[str, Any] | None:
    try:
        prompt_set, _ = registry.load(category)
    except PromptSetError:
        return None
    fitted = prompt_set.backbone
    apart = set(REFERENCE)
    if fitted.model_dump(exclude=apart) != settings.backbone.model_dump(exclude=apart):
        return None
    point = point_of(settings.space, prompt_set.settings, fitted)
    is_held = all(axis.holds(point[name]) for name, axis in settings.space.items())
    is_start = point == starting_point(settings.space, settings.backbone)
    return point if is_held and not is_start else None
