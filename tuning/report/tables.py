"""Tables of text for the log of a job."""

from collections.abc import Sequence

from apt_ray.tables import align
from tuning.results import TunedCategory


def closing_table(tuned: Sequence[TunedCategory]) -> str:
    """One line a category: the best settings and what came of them."""
    header = (
        "category",
        "context",
        "noise",
        "smgs",
        "rate",
        "validation",
        "threshold",
        "certified",
    )
    rows = [(*header, "version", "matters most")]
    for category in tuned:
        settings, threshold = category.prompt_set.settings, category.prompt_set.threshold
        rate = threshold.certified_false_alarm_rate
        matters = [f"{name} {share:.0%}" for name, share in category.importances.items()]
        rows.append(
            (
                category.version.category,
                str(settings.context_length),
                f"{settings.noise_strength:g}",
                f"{settings.smgs_weight:.2f}",
                f"{settings.learning_rate:.4f}",
                f"{category.winner.validation[-1]:.3f} ± {category.winner.validation_sd[-1]:.3f}",
                f"{threshold.value:.3f}",
                "no" if rate is None else f"at {rate:g}",
                str(category.version.version),
                ", ".join(matters[:2]) or "-",
            )
        )
    return align(rows)
