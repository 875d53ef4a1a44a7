import asyncio

import httpx
import pytest
from fastapi import FastAPI, Request

from serving.api.headers import is_current, middlewares, quality

PNG, JSON = "image/png", "application/json"


@pytest.mark.parametrize(
    ("accept", "prefers_png", "takes_json"),
    [
        ("", False, True),
        ("*/*", False, True),
        ("image/png", True, False),
        ("image/*", True, False),
        ("IMAGE/PNG ; Q=1", True, False),
        ("image/png, */*", True, True),
        ("image/png, application/json", False, True),
        ("image/png;q=0.5, application/json;q=0.9", False, True),
        ("image/png;q=0.9, application/json;q=0.5", True, True),
        ("image/png;q=0", False, False),
        ("image/png;q=0, */*", False, True),
        ("image/png; q=0.000, image/*", False, False),
        ("application/json;q=0, */*;q=0.1", True, False),
        ("text/html,image/avif,image/webp,image/png,*/*;q=0.8", True, True),  # Firefox
        ("text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2", False, True),  # Java
        ("image/png;q=much", False, False),
        (f"image/png;q=0.{'3' * 5000}", True, False),
        (",;q=,;", False, False),
    ],
)
def test_the_best_range_of_an_accept_header_decides(
    accept: str, prefers_png: bool, takes_json: bool
) -> None:
    assert (quality(accept, PNG) > quality(accept, JSON)) is prefers_png
    assert (quality(accept, JSON)[0] > 0) is takes_json


@pytest.mark.parametrize(
    ("if_none_match", "is_known"),
    [
        ('W/"a"', True),
        ('"a"', True),
        ('"b" , W/"a"', True),
        ("*", True),
        ("", False),
        ("a", False),
        ('W/"aa"', False),
    ],
)
def test_a_caller_says_what_it_has(if_none_match: str, is_known: bool) -> None:
    assert is_current(if_none_match, 'W/"a"') is is_known


@pytest.mark.parametrize(
    ("name", "value", "passes"),
    [
        ("X-Request-ID", b"part-4711/a", True),
        ("X-Request-ID", b"7" * 128, True),
        ("X-Request-ID", b"7" * 129, False),
        ("X-Request-ID", b"Stra\xdfe", False),
        ("X-Request-ID", "Straße".encode(), False),
        ("X-Request-ID", b"two words", False),
        ("X-Request-ID", b"", False),
        ("traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", True),
        ("traceparent", b"\xff", False),
        ("X-Request-Timeout-Seconds", b"0.001", False),
        ("X-Request-Disconnect-Disabled", b"?1", False),
        ("X-Session-Id", b"\xfc", False),
        ("serve_multiplexed_model_id", b"x", False),
        ("Serve-Multiplexed-Model-Id", b"x", False),
        ("Cookie", b"a=\xe9", True),
        ("X-Timeout-Ms", b"soon", True),
    ],
)
def test_only_headers_that_serve_can_read_and_callers_may_send_pass(
    name: str, value: bytes, passes: bool
) -> None:
    app = FastAPI()

    @app.get("/")
    async def shown(request: Request) -> bool:
        return name in request.headers

    (middleware,) = middlewares()
    app.add_middleware(middleware.cls, *middleware.args, **middleware.kwargs)

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:
            return await client.get("/", headers=[(name.encode(), value)])

    assert asyncio.run(send()).json() is passes
