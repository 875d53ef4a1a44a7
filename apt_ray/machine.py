"""Who runs this, where that user's files lie, and which names are this machine's own: also where a
uid has neither name nor home."""

import getpass
import os
import socket
from ipaddress import ip_address
from pathlib import Path

_NO_HOME = "/nonexistent"


def settle() -> None:
    """Give this process, and those that it starts, a name and a home, where its uid has none.

    Containers may run under any uid. MLflow asks for a home when it is imported, Ray and PyTorch
    ask for a name. The home cannot be written to: caches do without, and what must be kept says
    how to name another place.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = _NO_HOME
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid-{os.getuid()}"


def who(user: str | None = None) -> str:
    """User and machine; the user is that of this process unless given."""
    settle()
    return f"{user or getpass.getuser()}@{socket.gethostname()}"


def expanded(path: Path) -> Path:
    """The path with `~` replaced."""
    settle()
    return path.expanduser()


def cache_folder() -> Path:
    """Where this user's caches lie: $XDG_CACHE_HOME/apt-ray, or ~/.cache/apt-ray."""
    return Path(os.environ.get("XDG_CACHE_HOME") or expanded(Path("~/.cache"))) / "apt-ray"


def pending_folder() -> Path:
    """Where a machine keeps what could not be registered: APT_RAY_PENDING, or the user's state."""
    state = os.environ.get("XDG_STATE_HOME") or expanded(Path("~/.local/state"))
    return Path(os.environ.get("APT_RAY_PENDING") or Path(state) / "apt-ray" / "pending")


def is_loopback(host: str) -> bool:
    """Whether a name or an address is that of this machine, for itself alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
