"""Libraries that only a part of apt-ray needs, and the command that installs them."""

from importlib.util import find_spec

from apt_ray.errors import MissingDependencyError


def require(*modules: str, extra: str) -> None:
    """Make sure that libraries are installed, before anything is done in vain; imports none.

    Args:
        modules: their top-level modules.
        extra: the extra of apt-ray that brings them.

    Raises:
        MissingDependencyError: names those that are missing, and the command that installs them.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise MissingDependencyError(
            f"this needs {', '.join(missing)}: pip install 'apt-ray[{extra}]'"
        )
