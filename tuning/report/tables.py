"""Tables of text for the log of a job."""

from collections.abc import Sequence

from apt_ray.tables import align
from tuning.results import TunedCategory


def closing_table(tuned: Sequence[TunedCategory]) -> str:
    """One line a category: the best settings and what came of them."""
    searched = list(dict.fromkeys(name for one in tuned for name in one.winner.settings))
    rows = [("category", *searched, "validation", "threshold", "certified", "version")]
    for category in tuned:
        threshold = category.prompt_set.threshold
        rate = threshold.certified_false_alarm_rate
        rows.append(
            (
                category.version.category,
                *(_short(category.winner.settings.get(name, "-")) for name in searched),
                f"{category.winner.validation[-1]:.3f} ± {category.winner.validation_sd[-1]:.3f}",
                f"{threshold.value:.3f}",
                "no" if rate is None else f"at {rate:g}",
                str(category.version.version),
            )
        )
    return "\n".join([align(rows), *(_matters(category) for category in tuned)])


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _matters(category: TunedCategory) -> str:
    """What the search found, and which settings it saw to matter."""
    seen = [f"{name} {one}" for name, one in category.importances.items() if one.is_seen]
    matters = f"; what matters: {', '.join(seen)}" if seen else ""
    return f"{category.version.category}: {category.verdict}{matters}"
