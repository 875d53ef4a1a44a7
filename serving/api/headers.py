"""The headers of requests: which of them pass, and what they mean.

Ray Serve's own servers read some headers before any application does. They answer a bare 500 to
bytes that are not UTF-8, and take orders that are no caller's to give. Ray wraps those servers in
what RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names in the environment of its nodes: `middlewares`.
"""

import re

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

# What the value must be for the header to pass; None for orders to Serve itself.
_ACCEPTED = {
    b"x-request-id": re.compile(rb"[!-~]{1,128}"),
    b"traceparent": re.compile(rb"[!-~]{1,128}"),
    b"tracestate": re.compile(rb"[ -~]{1,512}"),
    b"x-request-timeout-seconds": None,
    b"x-request-disconnect-disabled": None,
    b"x-session-id": None,
    b"serve-multiplexed-model-id": None,
}
_WEIGHT = re.compile(r"q=([01](?:\.\d*)?|\.\d+)")  # Java begins it with the point


class PassedHeaders:
    """Leaves out of every request the headers that do not pass.

    Serve is told to set a stream no limit of time: its route has one of its own.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = [(name, value) for name, value in scope["headers"] if _passes(name, value)]
            if scope["method"] == "POST" and scope["path"].endswith("/stream"):
                headers.append((b"x-request-timeout-seconds", b"0"))
            scope = {**scope, "headers": headers}
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What Ray wraps each of its HTTP servers in."""
    return [Middleware(PassedHeaders)]


def quality(accept: str, media_type: str) -> tuple[float, int]:
    """How welcome a media type is by an Accept header (RFC 9110, 12.5.1); the more, the greater.

    That is the weight, 0..1, of the most specific range that contains it, then how specific it is:
    2 for the type itself, 1 for `image/*`, 0 for `*/*`. An empty header welcomes everything.
    """
    weights: dict[str, float] = {}
    for accepted in (accept.strip() or "*/*").lower().split(","):
        name, *parameters = (part.strip() for part in accepted.split(";"))
        given = next((each for each in parameters if each.startswith("q=")), "q=1")
        weight = _WEIGHT.fullmatch(given)
        weights[name] = min(float(weight[1]), 1.0) if weight else 0.0
    kind = media_type.partition("/")[0]
    for specificity, name in ((2, media_type), (1, f"{kind}/*"), (0, "*/*")):
        if name in weights:
            return weights[name], specificity if weights[name] else 0
    return 0.0, 0


def is_current(if_none_match: str, etag: str) -> bool:
    """Whether a caller has what `etag` names, by its If-None-Match header (RFC 9110, 13.1.2)."""
    known = [each.strip().removeprefix("W/") for each in if_none_match.split(",")]
    return known == ["*"] or etag.removeprefix("W/") in known


def _passes(name: bytes, value: bytes) -> bool:
    name = name.lower().replace(b"_", b"-")
    if name not in _ACCEPTED:
        return True
    accepted = _ACCEPTED[name]
    return accepted is not None and accepted.fullmatch(value) is not None
