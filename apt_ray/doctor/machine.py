"""Checks of this machine: Python, libraries, torch and GPU, weights, home, disks, ports."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import apt_ray
from apt_ray.doctor.findings import Finding, Setup, error, ok, skipped, warning
from apt_ray.doctor.http import Unanswered, ask, named_servers
from apt_ray.errors import BackboneError, WriteError
from apt_ray.features.weights import Weights, builtin_weights, trunk_weights
from apt_ray.files import check_writable
from apt_ray.machine import cache_folder, expanded, is_loopback, pending_folder, settle

PACKAGE = "apt-ray"

_GIB = 2**30
_FULL_GIB = 0.2
_FEW_FILES = 1000
_SHARED_MEMORY = Path("/dev/shm")
_SHARED_GIB = 1.0
_RAY_WORKER_PORTS = range(10_002, 20_000)
_PRIVATE_PORTS = {
    8265: ("Ray's dashboard and job server", "start Ray with --dashboard-host 127.0.0.1"),
    8404: ("HAProxy's statistics", "set RAY_SERVE_HAPROXY_BINARY_PATH (docs/operating.md)"),
    9101: ("HAProxy's metrics", "set RAY_SERVE_HAPROXY_BINARY_PATH (docs/operating.md)"),
}
_NAMED_SHOWN = 8
# In a process of its own: a build that does not fit its driver may crash or hang.
_ASK_TORCH = """
import json, torch
told = {"version": torch.__version__, "platform": torch.version.cuda or torch.version.hip}
try:
    told["devices"] = []
    for index in range(torch.cuda.device_count()):
        (torch.ones(8, device=f"cuda:{index}") + 1).sum().item()
        free, total = torch.cuda.mem_get_info(index)
        told["devices"].append([torch.cuda.get_device_name(index), free, total])
except Exception as error:
    told["failure"] = str(error).strip().splitlines()[0]
print(json.dumps(told))
"""


def python(setup: Setup) -> Iterator[Finding]:
    """The interpreter, and where apt-ray lies."""
    here = f"Python {platform.python_version()}, {sys.executable}"
    try:
        wanted = metadata(PACKAGE)["Requires-Python"]
    except PackageNotFoundError:
        yield warning(
            f"{here}; apt-ray is on its path but not installed, so the versions of its libraries"
            " cannot be compared",
            "pip install -e . in the checkout",
        )
        return
    if not SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        yield error(
            f"{here}; apt-ray {apt_ray.__version__} is for Python {wanted}",
            "make an environment of such a Python: python3.12 -m venv .venv",
        )
    else:
        yield ok(f"{here}; apt-ray {apt_ray.__version__}")


def versions(setup: Setup) -> Iterator[Finding]:
    """Libraries against the ranges of the package, and in a checkout against the tested set."""
    try:
        lines = requires(PACKAGE) or []
    except PackageNotFoundError:
        yield skipped("apt-ray is not installed", "pip install -e . in the checkout")
        return
    extras = sorted(set(metadata(PACKAGE).get_all("Provides-Extra") or []) - {"all", "dev"})
    complete, wrong = dict.fromkeys(extras, True), dict[str, Finding]()
    for requirement in map(Requirement, lines):
        for extra in ("", *extras):
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            if extra and not requirement.marker:
                continue  # everybody's
            found = _installed(requirement.name)
            if found is None and extra:
                complete[extra] = False
            elif found is None or not requirement.specifier.contains(found, prereleases=True):
                wanted = f"{requirement.name}{requirement.specifier}"
                wrong[requirement.name] = error(
                    f"{requirement.name} {found or 'is missing'}; apt-ray needs {wanted}",
                    f"pip install '{wanted}'",
                )
    yield from wrong.values()
    if not wrong:
        there = [extra for extra in extras if complete[extra]]
        yield ok(
            f"all libraries are in their ranges; extras that are installed:"
            f" {', '.join(there) or 'none'}"
        )
    yield from _against_tested(Path(apt_ray.__file__).parents[1] / "constraints.txt")


def _against_tested(constraints: Path) -> Iterator[Finding]:
    """In a checkout, which brings the versions that its tests ran with."""
    if not constraints.is_file():
        return
    compared, others = 0, []
    for line in constraints.read_text().splitlines():
        if not (text := line.partition("#")[0].strip()):
            continue
        tested = Requirement(text)
        found = _installed(tested.name)
        if found is None or (tested.marker and not tested.marker.evaluate()):
            continue
        compared += 1
        if not tested.specifier.contains(found, prereleases=True):
            others.append(f"{tested.name} {found} ({tested.specifier})")
    if others:
        more = len(others) - _NAMED_SHOWN
        shown = ", ".join(others[:_NAMED_SHOWN]) + (f" and {more} more" if more > 0 else "")
        yield warning(
            f"{len(others)} of {compared} libraries are not those of constraints.txt: {shown}",
            "pip install -c constraints.txt -e '.[all]', if something fails",
        )
    else:
        yield ok(f"{compared} libraries are those of constraints.txt")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def torch_build(setup: Setup) -> Iterator[Finding]:
    """torch in a process of its own, beside the GPUs that the driver knows."""
    gpus, failure = _gpus()
    if failure is not None:
        yield failure
    asked = subprocess.run(
        [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=55, check=False
    )
    if asked.returncode:
        last = (asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]
        yield error(f"torch does not load ({last})", "pip install --force-reinstall torch")
        return
    told: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    build = f"torch {told['version']}, built for {told['platform'] or 'CPUs'}"
    devices = told.get("devices", [])
    if told.get("failure"):
        yield error(
            f"{build}, cannot compute on the GPU ({told['failure']})",
            "install the torch that fits driver and GPU, or mend the driver",
        )
    elif gpus and not told["platform"]:
        yield warning(
            f"{build}, beside {', '.join(gpus)}: the GPU is not used",
            "install torch's build for CUDA: pip install --force-reinstall torch, from an index"
            " that has it",
        )
    elif gpus and not devices:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        yield error(
            f"{build}, sees none of {', '.join(gpus)}",
            f"CUDA_VISIBLE_DEVICES is {hidden!r}: unset it, or name GPUs"
            if hidden is not None
            else "the driver is older than this CUDA needs: update it, or install an older build",
        )
    elif devices:
        names = ", ".join(
            f"{name} ({free / _GIB:.1f} of {total / _GIB:.1f} GiB free)"
            for name, free, total in devices
        )
        yield ok(f"{build}, computes on {names}")
    else:
        yield ok(f"{build}; no GPU here: `num_gpus: 0` in the fleet file")


def _gpus() -> tuple[list[str], Finding | None]:
    """The GPUs that NVIDIA's driver names, and what is wrong with the driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        if not Path("/proc/driver/nvidia/version").exists():
            return [], None
        return [], warning(
            "NVIDIA's driver is loaded, but nvidia-smi is not there",
            "in a container: give it the utility capability (NVIDIA_DRIVER_CAPABILITIES)",
        )
    asked = subprocess.run(
        [command, "--query-gpu=name,driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    said = [line.strip() for line in asked.stdout.splitlines() if line.strip()]
    if asked.returncode:
        reason = (said + asked.stderr.strip().splitlines() or ["it says nothing"])[0]
        remedy = "load the driver (modprobe nvidia), or install it again for this kernel"
        return [], error(f"nvidia-smi fails: {reason}", remedy)
    return [
        f"{name} (driver {driver})" for name, _, driver in (line.rpartition(", ") for line in said)
    ], None


def weights(setup: Setup) -> Iterator[Finding]:
    """The files of the built-in encoders, by their SHA-256."""
    for name, find in (("apt-mini", builtin_weights), ("the trunk", trunk_weights)):
        try:
            file: Weights = find()
            file.read()
            yield ok(f"{name}: {file.path.name} is whole (SHA-256 {file.sha256[:16]}...)")
        except BackboneError as failure:
            what, _, remedy = str(failure).rpartition(": ")
            yield error(f"{name}: {what}", remedy)


def home(setup: Setup) -> Iterator[Finding]:
    """Where this user's files go by default."""
    settle()
    folder = Path.home()
    if folder.is_dir():
        yield ok(str(folder))
    else:
        yield warning(
            f"this user has no home ({folder} is no folder), so nothing is cached, and what the"
            " registry cannot take is lost",
            "set HOME, or XDG_CACHE_HOME and APT_RAY_PENDING, to folders that may be written to;"
            " in the fleet file `cache` and `folder`",
        )


def disk(setup: Setup) -> Iterator[Finding]:
    """What is written to, and how much room it has."""
    folders = {"caches": cache_folder(), "what waits for the registry": pending_folder()}
    try:
        folders["temporary files"] = Path(tempfile.gettempdir())
    except OSError as failure:
        yield error(f"no temporary folder ({failure})", "make room in /tmp, or set TMPDIR")
    if hub := os.environ.get("HF_HOME"):
        folders["downloaded weights"] = Path(hub)
    folders |= {str(folder): expanded(folder) for folder in setup.folders}
    seen: set[int] = set()
    for name, folder in folders.items():
        try:
            check_writable(folder, is_folder=True)
        except WriteError as failure:
            what, _, remedy = str(failure).rpartition(": ")
            yield error(f"{name}: {what}", remedy)
            continue
        place = _nearest(folder)
        device = place.stat().st_dev
        if device in seen:
            continue
        seen.add(device)
        yield _room(name, folder, place, setup.free_gib)
    if find_spec("ray") and _SHARED_MEMORY.is_dir():
        total = shutil.disk_usage(_SHARED_MEMORY).total / _GIB
        if total < _SHARED_GIB:
            yield warning(
                f"{_SHARED_MEMORY} has {total:.2f} GiB: Ray's object store falls back to the disk",
                "in a container: --shm-size=2g, or a memory volume at /dev/shm",
            )


def _room(name: str, folder: Path, place: Path, wanted_gib: float) -> Finding:
    free = shutil.disk_usage(place).free / _GIB
    files = os.statvfs(place)
    what = f"{name}: {folder}, {free:.1f} GiB free"
    if files.f_files and files.f_favail < _FEW_FILES:
        return error(f"{what}, but room for {files.f_favail} files only", "remove small files")
    if free < _FULL_GIB:
        return error(what, "make room, or name a folder on another disk")
    if free < wanted_gib:
        return warning(f"{what}, less than {wanted_gib:g}", "make room before it is full")
    return ok(what)


def _nearest(path: Path) -> Path:
    """The folder that is there already."""
    place = Path(os.path.realpath(path))
    while not place.exists():
        place = place.parent
    return place


def ports(setup: Setup) -> Iterator[Finding]:
    """Whether the fleet's port is free, and what can be reached from elsewhere that should not."""
    if setup.port in _RAY_WORKER_PORTS:
        yield warning(
            f"port {setup.port} is among those that Ray gives to its workers"
            f" ({_RAY_WORKER_PORTS.start} to {_RAY_WORKER_PORTS.stop - 1})",
            "choose another --http-port, such as 8000",
        )
    listening = _listening()
    if listening is None:
        yield skipped("what listens can be seen on Linux alone")
        return
    if setup.port not in listening:
        yield ok(f"port {setup.port} is free for a fleet")
    else:
        try:
            is_fleet = ask(f"http://127.0.0.1:{setup.port}/healthz").json() == {"status": "ok"}
        except Unanswered:
            is_fleet = False
        yield (
            ok(f"a fleet answers at port {setup.port}")
            if is_fleet
            else warning(
                f"port {setup.port} is taken, and not by a fleet",
                f"see who has it (ss -ltnp 'sport = :{setup.port}') and end it, or deploy with"
                " another --http-port and give it to doctor",
            )
        )
    private = dict(_PRIVATE_PORTS)
    for server in named_servers(setup):
        # A fleet may be offered to others: it asks for tokens then.
        if is_loopback(server.host) and server.name != "fleet":
            private.setdefault(
                server.port,
                (server.name, "let it listen on 127.0.0.1, or put a firewall before it"),
            )
    for port, (name, remedy) in private.items():
        if any(not is_loopback(address) for address in listening.get(port, ())):
            yield warning(f"port {port} ({name}) can be reached from other machines", remedy)


def _listening() -> dict[int, list[str]] | None:
    """Port -> addresses on which something listens; None where the system does not say."""
    found: dict[int, list[str]] = {}
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:
            if table.name == "tcp":
                return None
            continue
        for line in lines:
            local, state = line.split()[1], line.split()[3]
            if state == "0A":
                address, _, port = local.rpartition(":")
                found.setdefault(int(port, 16), []).append(_address(address))
    return found


def _address(text: str) -> str:
    """An address as the kernel writes it: words of 32 bits, each in the order of this machine."""
    words = (text[place : place + 8] for place in range(0, len(text), 8))
    octets = b"".join(int(word, 16).to_bytes(4, sys.byteorder) for word in words)
    if len(octets) == 4:
        return ".".join(map(str, octets))
    mapped = octets.removeprefix(bytes(10) + b"\xff\xff")
    if len(mapped) == 4:
        return ".".join(map(str, mapped))
    return "::1" if octets == bytes(15) + b"\x01" else "::"


def installed() -> Iterable[tuple[str, str]]:
    """Name and version of every library here, by name."""
    from importlib.metadata import distributions

    found = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]}
    return sorted(found.items(), key=lambda one: one[0].lower())
