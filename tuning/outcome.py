"""What has become of the categories of a search."""

import traceback

from ray.exceptions import RayTaskError

from apt_ray.data.distinct import describe_copies
from apt_ray.errors import AptError
from tuning.progress import say
from tuning.results import TunedCategory


class Outcome:
    """Collects what was registered and what failed, from any thread, and says each in the log.

    Attributes:
        tuned: What was registered.
        failures: Category -> why it was not.
    """

    def __init__(self) -> None:
        self.tuned: list[TunedCategory] = []
        self.failures: dict[str, str] = {}

    def succeed(self, tuned: TunedCategory) -> None:
        """Note a category that is registered."""
        self.tuned.append(tuned)
        version = tuned.version
        say(f"{version.category}: version {version.version} is {' and '.join(version.aliases)}")
        if copies := tuned.prompt_set.provenance.copies:
            say(f"{version.category}: {describe_copies(copies)}")

    def fail(self, category: str, error: Exception) -> None:
        """Note why a category is not registered; the log has the traceback of what is a bug."""
        cause = error.cause if isinstance(error, RayTaskError) else error
        is_expected = isinstance(cause, AptError)
        if not is_expected:
            traceback.print_exception(error)
        self.failures[category] = str(cause) if is_expected else f"{type(cause).__name__}: {cause}"
        say(f"{category} failed: {self.failures[category]}")
