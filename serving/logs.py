"""Structured logs: one line an inspection and one an operation, through Serve's own logger.

The fleet runs Serve with JSON logs: every field given here, the request's id and the replica stand
in each line.
"""

import logging
from datetime import datetime, timezone

logger = logging.getLogger("ray.serve")


def audit(operation: str, **fields: object) -> dict[str, object]:
    """Log an operation; returns what was logged."""
    line = {
        "at": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "operation": operation,
        **fields,
    }
    logger.info("audit: %s", operation, extra={"audit": line})
    return line
