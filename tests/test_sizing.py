"""How large a fleet and a search have to be."""

import json

import pytest

from apt_ray.cli.main import main
from apt_ray.errors import SettingsError
from apt_ray.sizing import (
    BUSY,
    FleetDemand,
    SearchDemand,
    Speeds,
    mean_time,
    plan_fleet,
    plan_search,
)

SPEEDS = Speeds(image_s=0.04, decode_s=0.01, variation=0.0, request_s=0.0, replica_mib=500.0)


def test_replicas_follow_the_rate_and_are_not_too_busy() -> None:
    for rps in (0.0, 1.0, 14.0, 14.1, 200.0):
        plan = plan_fleet(FleetDemand(categories=3, rps=rps), SPEEDS)
        assert plan.busy <= BUSY + 1e-9
        assert plan.replicas == 1 or rps * 0.05 / (plan.replicas - 1) > BUSY
    assert plan_fleet(FleetDemand(categories=3, rps=14.0), SPEEDS).replicas == 1
    assert plan_fleet(FleetDemand(categories=3, rps=14.1), SPEEDS).replicas == 2
    large = plan_fleet(FleetDemand(categories=3, rps=14.0, megapixels=12.0), SPEEDS)
    assert large.replicas == 4  # 160 ms an image


def test_own_pools_have_a_replica_each() -> None:
    own = plan_fleet(FleetDemand(categories=100, rps=10.0, shared=False), SPEEDS)
    shared = plan_fleet(FleetDemand(categories=100, rps=10.0), SPEEDS)
    assert (own.pools, own.replicas) == (100, 100)
    assert (shared.pools, shared.replicas) == (1, 1)
    assert shared.replica_mib - own.replica_mib == pytest.approx(99 * SPEEDS.category_mib)
    (warning,) = own.warnings
    assert "share a pool" in warning


def test_nodes_are_bound_by_cpus_or_by_memory() -> None:
    demand = FleetDemand(categories=1, rps=200.0, node_cpus=8, price=0.5)
    plan = plan_fleet(demand, SPEEDS)
    assert (plan.replicas, plan.nodes, plan.cost) == (15, 2, 1.0)
    small = plan_fleet(FleetDemand(categories=1, rps=200.0, node_gib=2.0), SPEEDS)
    assert small.nodes == 4  # four replicas of 500 MiB fit


def test_what_is_felt_first_is_said_with_its_remedy() -> None:
    many = plan_fleet(FleetDemand(categories=100_000, rps=1.0), SPEEDS)
    memory, registry = many.warnings
    assert "pools of at most" in memory
    assert "registry.poll_s" in registry
    assert plan_fleet(FleetDemand(categories=10, rps=1.0), SPEEDS).warnings == ()


def test_a_queue_is_as_theory_has_it() -> None:
    # M/D/1 and M/M/1, from any textbook.
    assert mean_time(1, 0.5, 0.0) == pytest.approx(1.5)
    assert mean_time(1, 0.5, 1.0) == pytest.approx(2.0)
    assert mean_time(4, 0.0, 1.0) == 1.0
    times = [mean_time(replicas, 0.7, 0.5) for replicas in (1, 2, 4, 8, 32)]
    assert times == sorted(times, reverse=True)


def test_a_search_is_bound_by_its_cpus() -> None:
    one = plan_search(SearchDemand(categories=5, trials=64, cpus=1), SPEEDS)
    eight = plan_search(SearchDemand(categories=5, trials=64, cpus=8), SPEEDS)
    assert one.clock_h == pytest.approx(one.encoding_h + one.training_h + one.tune_h)
    assert eight.clock_h == pytest.approx(one.clock_h / 8)
    assert eight.encoding_h == one.encoding_h


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"categories": 0}, "categories must be more than 0"),
        ({"rps": -1.0}, "rps must not be less than 0"),
        ({"replica_cpus": 9.0}, "fits on no node of 8"),
    ],
)
def test_demands_that_cannot_be_are_refused(wrong: dict[str, float], said: str) -> None:
    demand = {"categories": 1, "rps": 1.0} | wrong
    with pytest.raises(SettingsError, match=said):
        FleetDemand(**demand)  # type: ignore[arg-type]


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--categories", "1000", "--rps", "200", "--image-ms", "50"]
    assert main([*arguments, "--price", "0.4"]) == 0
    table = capsys.readouterr().out
    assert "1,000 categories in one pool, 200 images/s" in table
    assert "an hour" in table
    assert main([*arguments, "--json", "-"]) == 0
    plan = json.loads(capsys.readouterr().out)["fleet"]["plan"]
    assert f"{plan['replicas']:,}, busy" in table
    assert main(["plan", "--categories", "0"]) == 1
    assert "error: categories must be more than 0" in capsys.readouterr().err


def test_the_encoders_may_be_timed_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--measure", "--json", "-"]) == 0
    speeds = json.loads(capsys.readouterr().out)["speeds"]
    assert "timed here" in speeds["name"]
    assert speeds["image_s"] > 0
    assert speeds["image_s"] != Speeds().image_s
