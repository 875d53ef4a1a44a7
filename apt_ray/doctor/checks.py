"""All checks, in the order in which they are told."""

from collections.abc import Collection

from apt_ray.doctor import machine, servers
from apt_ray.doctor.findings import Check, Finding, Setup, side_by_side

CHECKS = {
    "python": Check(machine.python),
    "versions": Check(machine.versions),
    "torch": Check(machine.torch_build, limit_s=60),
    "weights": Check(machine.weights),
    "home": Check(machine.home),
    "disk": Check(machine.disk),
    "ports": Check(machine.ports),
    "proxy": Check(servers.proxy),
    "ray": Check(servers.ray),
    "mlflow": Check(servers.mlflow),
    "s3": Check(servers.s3, limit_s=30),
    "fleet": Check(servers.fleet),
    "clock": Check(servers.clock),
}


def diagnose(setup: Setup, only: Collection[str] = ()) -> list[Finding]:
    """What is right and wrong here.

    Args:
        only: names of the checks to make; none means all.
    """
    chosen = {name: check for name, check in CHECKS.items() if not only or name in only}
    return side_by_side(chosen, setup)
