"""What the images of a category came to in the last hour: counted by replicas, summed by the
controller.

Counts of several replicas add up where percentiles do not, so that times are counted in bins, too.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from pydantic import Field

from apt_ray.config import Settings

SCORE_BINS = 20
LATENCY_BINS = 64
# The first bin ends at 1 ms, four make a doubling, the last holds all above 46 s.
_BINS_PER_DOUBLING = 4


class Counts(Settings):
    """The images of one category that one replica inspected in the last hour."""

    rejected: int = Field(description="Images found anomalous.")
    scores: tuple[int, ...] = Field(description="Images in 20 equal bins of scores, 0..1.")
    latencies: tuple[int, ...] = Field(description="Images by how long their answers took.")


class Activity(Settings):
    """The last hour of a category, of all replicas that run now."""

    inspected: int = Field(description="Images that were answered.")
    rejected: int = Field(description="Those of them found anomalous.")
    latency_ms_p50: float | None = Field(
        description="Milliseconds that half of the answers took at most, from the whole image"
        " at the replica to the report; to about 10 %."
    )
    latency_ms_p95: float | None = Field(description="The same of 95 % of the answers.")
    scores: tuple[int, ...] = Field(description="Images in 20 equal bins of scores, 0..1.")


def score_bin(score: float) -> int:
    """The bin of a score in 0..1."""
    return min(max(int(score * SCORE_BINS), 0), SCORE_BINS - 1)


def latency_bin(ms: float) -> int:
    """The bin of a time in milliseconds."""
    if ms < 1:
        return 0
    return min(1 + int(math.log2(ms) * _BINS_PER_DOUBLING), LATENCY_BINS - 1)


def summed(counts: Sequence[Counts]) -> Activity | None:
    """The activity of all of them together; None if there are none."""
    if not counts:
        return None
    scores = tuple(map(sum, zip(*(each.scores for each in counts), strict=True)))
    latencies = tuple(map(sum, zip(*(each.latencies for each in counts), strict=True)))
    return Activity(
        inspected=sum(scores),
        rejected=sum(each.rejected for each in counts),
        latency_ms_p50=_percentile_ms(latencies, 0.5),
        latency_ms_p95=_percentile_ms(latencies, 0.95),
        scores=scores,
    )


def _percentile_ms(latencies: Sequence[int], q: float) -> float | None:
    """Interpolated within the bin that holds it, where times are even by their logarithm."""
    up_to = list(accumulate(latencies))
    if not up_to[-1]:
        return None
    rank = q * up_to[-1]
    index = bisect_left(up_to, rank)
    share = 1 - (up_to[index] - rank) / latencies[index]
    return round(math.pow(2.0, (index - 1 + share) / _BINS_PER_DOUBLING), 2)
