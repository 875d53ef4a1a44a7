"""How often kinds of defects are named right: tables of confusion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from apt_ray.tables import markdown
from apt_ray.text import printable


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """What defective test images were called.

    Attributes:
        examples: confirmed defects of each kind, which are not among the images.
        pairs: of each image, its kind and the kind that was most probable.
    """

    category: str
    seed: int
    examples: int
    pairs: tuple[tuple[str, str], ...]

    @property
    def kinds(self) -> list[str]:
        """All that there are, by name."""
        return sorted({kind for pair in self.pairs for kind in pair})

    def right(self, kind: str) -> float:
        """The share of a kind's images that are named so, 0..1."""
        said = [name for true, name in self.pairs if true == kind]
        return said.count(kind) / len(said)

    @property
    def balanced_accuracy(self) -> float:
        """The mean of `right` over the kinds of the images, 0..1; chance is one in as many."""
        return fmean(self.right(kind) for kind in {true for true, _ in self.pairs})


def format_confusion(named: Sequence[Named]) -> str:
    """For each category a Markdown table, images of all seeds together, and what it comes to."""
    groups: dict[str, list[Named]] = {}
    for one in named:
        groups.setdefault(one.category, []).append(one)
    return "\n\n".join(_confusion(category, group) for category, group in groups.items())


def _confusion(category: str, group: Sequence[Named]) -> str:
    counts = Counter(pair for one in group for pair in one.pairs)
    kinds = sorted({kind for one in group for kind in one.kinds})
    # Columns bear numbers: names of many kinds, or long ones, would fit on no screen.
    rows = [
        (
            f"{number} {printable(true)}",
            *(str(counts[true, said]) for said in kinds),
            f"{100 * fmean(one.right(true) for one in group):.0f} %",
        )
        for number, true in enumerate(kinds, 1)
    ]
    columns = map(str, range(1, len(kinds) + 1))
    mean = fmean(one.balanced_accuracy for one in group)
    return (
        f"{category}: kinds by {group[0].examples} confirmed defects of each, rows as they are,"
        f" columns as they are named; {mean:.1%} right in the mean of the kinds, by chance"
        f" {1 / len(kinds):.1%}\n\n" + markdown(("", *columns, "right"), rows)
    )
