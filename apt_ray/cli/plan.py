"""`apt-ray plan`: how large a fleet and a search have to be."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

from apt_ray.cli.common import add_backbone, add_command, add_json, backbone, writing_json
from apt_ray.cli.flags import number
from apt_ray.sizing import (
    BUSY,
    FleetDemand,
    FleetPlan,
    SearchDemand,
    SearchPlan,
    Speeds,
    plan_fleet,
    plan_search,
)
from apt_ray.tables import align
from apt_ray.text import duration

_REPEATS = 5


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = add_command(
        commands, "plan", _run, "say how many replicas, nodes and hours a fleet takes"
    )
    whole, real = number(int), number(float)
    fleet = plan.add_argument_group("fleet")
    fleet.add_argument("--categories", type=whole, default=50, help="products (50)")
    fleet.add_argument("--rps", type=real, default=10.0, help="images a second in all (10)")
    fleet.add_argument("--megapixels", type=real, default=1.0, help="of an image (1)")
    fleet.add_argument(
        "--pools",
        choices=("shared", "own"),
        default="shared",
        help="whether categories share replicas, or each has its own (shared)",
    )
    fleet.add_argument("--replica-cpus", type=real, default=1.0, help="num_cpus of a replica (1)")
    fleet.add_argument("--node-cpus", type=whole, default=8, help="CPUs of a node (8)")
    fleet.add_argument("--node-gib", type=real, default=32.0, help="memory of a node (32)")
    fleet.add_argument("--price", type=real, help="of a node for an hour")
    search = plan.add_argument_group("search of all categories")
    search.add_argument("--trials", type=whole, default=64, help="of each category (64)")
    search.add_argument("--search-cpus", type=whole, default=8, help="CPUs that search (8)")
    speeds = plan.add_argument_group("speeds")
    speeds.add_argument(
        "--measure", action="store_true", help="time the encoders here, not docs/scaling.md's"
    )
    speeds.add_argument("--image-ms", type=real, help="milliseconds of a replica for an image")
    add_backbone(plan)
    add_json(plan, "write the plan as JSON")


def _run(options: argparse.Namespace) -> int:
    demand = FleetDemand(
        categories=options.categories,
        rps=options.rps,
        megapixels=options.megapixels,
        shared=options.pools == "shared",
        replica_cpus=options.replica_cpus,
        node_cpus=options.node_cpus,
        node_gib=options.node_gib,
        price=options.price,
    )
    wanted = SearchDemand(
        categories=options.categories, trials=options.trials, cpus=options.search_cpus
    )
    with writing_json(options.json) as write:
        speeds = _measured(options) if options.measure else Speeds()
        if options.image_ms is not None:
            speeds = replace(speeds, name="as given", image_s=options.image_ms / 1000)
        fleet, search = plan_fleet(demand, speeds), plan_search(wanted, speeds)
        print(_table(demand, fleet, wanted, search, speeds))
        for warning in fleet.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        write(
            {
                "speeds": asdict(speeds),
                "fleet": {"demand": asdict(demand), "plan": asdict(fleet)},
                "search": {"demand": asdict(wanted), "plan": asdict(search)},
            }
        )
    return 0


def _table(
    demand: FleetDemand,
    fleet: FleetPlan,
    wanted: SearchDemand,
    search: SearchPlan,
    speeds: Speeds,
) -> str:
    pools = "one pool" if fleet.pools == 1 else f"{fleet.pools:,} pools"
    rows = [
        ("speeds", speeds.name),
        ("fleet", f"{demand.categories:,} categories in {pools}, {demand.rps:g} images/s"),
        (
            "replicas",
            f"{fleet.replicas:,}, busy {fleet.busy:.0%} of their time ({BUSY:.0%} at most)",
        ),
        ("latency", f"{1000 * fleet.latency_s:.0f} ms in the mean"),
        ("memory", f"{fleet.memory_gib:.1f} GiB, {fleet.replica_mib:,.0f} MiB a replica"),
        ("nodes", f"{fleet.nodes:,} of {demand.node_cpus} CPUs and {demand.node_gib:g} GiB"),
    ]
    if fleet.cost is not None:
        rows.append(("cost", f"{fleet.cost:,.2f} an hour, {720 * fleet.cost:,.0f} in 30 days"))
    rows += [
        ("search", f"{wanted.trials} trials of each category on {wanted.cpus} CPUs"),
        ("", f"{duration(3600 * search.encoding_h)} of CPU to encode, once"),
        ("", f"{duration(3600 * search.training_h)} to train and judge, if none were stopped"),
        ("", f"{duration(3600 * search.tune_h)} of Ray Tune's own"),
        ("by the clock", duration(3600 * search.clock_h)),
    ]
    return align(rows)


def _measured(options: argparse.Namespace) -> Speeds:
    """Speeds whose encoders and decoding were timed here."""
    import torch
    from PIL import Image

    from apt_ray.images import decode_image, encode_jpeg

    torch.set_num_threads(1)
    encoder = backbone(options)
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()
    image = Image.fromarray(noise).resize((1000, 1000), Image.Resampling.BICUBIC)
    data = encode_jpeg(image, side=1000)

    def seconds(work: Callable[[], object]) -> float:
        work()  # the first warms up
        taken = []
        for _ in range(_REPEATS):
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
        return sorted(taken)[_REPEATS // 2]

    encode_s = seconds(partial(lambda: encoder.encode_images(encoder.preprocess([image]))))
    return replace(
        Speeds(),
        name="encoders and decoding timed here, all else as in docs/scaling.md",
        image_s=encode_s,
        decode_s=seconds(partial(decode_image, data)),
    )
