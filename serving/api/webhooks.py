"""MLflow's webhook: the registry says itself that an alias moved.

The signature is HMAC-SHA256 over `<delivery id>.<timestamp>.<body>`, as MLflow's documentation of
webhooks has it (Standard Webhooks).
"""

import base64
import hashlib
import hmac
import re
import time
from collections.abc import Mapping
from http import HTTPStatus

from serving.api.problems import ProblemError

SECRET_VARIABLE = "APT_RAY_WEBHOOK_SECRET"
MAX_BYTES = 2**20
_MAX_AGE_S = 300
_VERSION = "v1"


def verify(
    headers: Mapping[str, str], body: bytes, *, secret: str, now: float | None = None
) -> str:
    """The delivery's id; ProblemError if it is not signed with `secret`, or older than minutes."""
    delivery, timestamp = headers.get("x-mlflow-delivery-id"), headers.get("x-mlflow-timestamp")
    signature = headers.get("x-mlflow-signature", "")
    if not secret:
        raise _refused(
            "this fleet takes no webhooks: it has no secret",
            f"Set {SECRET_VARIABLE} in the environment of the Ray nodes and start them again.",
        )
    if not delivery or not timestamp or not signature:
        raise _refused("the delivery is not signed", "Create the webhook in MLflow with a secret.")
    expected = hmac.new(
        secret.encode(), f"{delivery}.{timestamp}.".encode() + body, hashlib.sha256
    ).digest()
    wanted = f"{_VERSION},{base64.b64encode(expected).decode()}"
    if not hmac.compare_digest(signature.encode(), wanted.encode()):
        raise _refused(
            "the signature is wrong", f"Create the webhook with the secret in {SECRET_VARIABLE}."
        )
    if not re.fullmatch(r"[0-9]{1,15}", timestamp):
        raise _refused("its timestamp is no number of seconds", "Send Unix time, as MLflow does.")
    age_s = (time.time() if now is None else now) - int(timestamp)
    if abs(age_s) > _MAX_AGE_S:
        raise _refused(
            f"the delivery is {age_s:.0f} s old", "Set the clocks of both machines right."
        )
    return delivery


def _refused(detail: str, remedy: str) -> ProblemError:
    return ProblemError(HTTPStatus.FORBIDDEN, "Webhook refused", detail, remedy)
