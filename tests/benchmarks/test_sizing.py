"""The model of `apt-ray plan` beside a simulation."""

import pytest

from apt_ray.sizing import mean_time
from benchmarks.sizing import simulate

TAKEN_S = [0.03, 0.04, 0.05, 0.08]
MEAN_S, VARIATION = 0.05, 0.14


@pytest.mark.parametrize("replicas", [1, 2, 4, 16])
@pytest.mark.parametrize("busy", [0.3, 0.7])
def test_the_model_agrees_with_a_simulation(replicas: int, busy: float) -> None:
    simulated = simulate(replicas, busy, TAKEN_S, arrivals=20_000, seed=1)
    assert simulated == pytest.approx(MEAN_S * mean_time(replicas, busy, VARIATION), rel=0.15)
