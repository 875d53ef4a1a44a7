"""Whatever is sent, the answer is a verdict or a problem that names a remedy: never a 500."""

import asyncio
import base64
import io
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from apt_ray.detection.prompt_set import PromptSet
from serving.api.access import Access
from serving.api.ingress import create_api
from serving.controller.orders import Order, StoredVersion
from serving.settings import Auth, HttpLimits
from tests.mutations import mutated, png_that_claims
from tests.serving.engines import torch_inspector

LIMITS = HttpLimits(max_bytes=2_000_000, max_pixels=4_000_000, timeout_s=20)


@pytest.fixture(scope="module")
def api(prompt_set: PromptSet) -> FastAPI:
    inspector = torch_inspector(limits=LIMITS.image)
    stored = StoredVersion(category="nut", version=1, run_id="", data=prompt_set.to_bytes())
    inspector.load("nut", Order(version=1), stored)
    return create_api(inspector, http=LIMITS, access=Access(Auth()))


def ask(api: FastAPI, content: bytes, **request: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:
            return await client.post("/v1/nut/inspect", content=content, **request)

    return asyncio.run(send())


def says_what_to_do(response: httpx.Response) -> bool:
    """Whether it is a verdict, or a problem that names its remedy."""
    if response.status_code == 200:
        return "anomaly_score" in response.text or response.content.startswith(b"\x89PNG")
    is_problem = response.headers["content-type"] == "application/problem+json"
    return is_problem and bool(response.json()["remedy"])


def saved(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


GRAY16 = Image.fromarray(np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16))
RGB = Image.radial_gradient("L").convert("RGB")
FRAMES = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green")]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        pytest.param(saved(RGB.resize((1, 1))), 200, id="1x1"),
        pytest.param(saved(RGB.resize((1, 900))), 200, id="1x900"),
        pytest.param(saved(GRAY16), 200, id="16 bit"),
        pytest.param(saved(GRAY16, "TIFF"), 200, id="16 bit TIFF"),
        pytest.param(saved(RGB.convert("CMYK"), "JPEG"), 200, id="CMYK"),
        pytest.param(saved(RGB.convert("P")), 200, id="palette"),
        pytest.param(saved(RGB.convert("1")), 200, id="1 bit"),
        pytest.param(saved(RGB.convert("LA")), 200, id="gray and alpha"),
        pytest.param(saved(RGB.convert("RGBA")), 200, id="alpha"),
        pytest.param(saved(FRAMES[0], save_all=True, append_images=FRAMES[1:]), 200, id="APNG"),
        pytest.param(
            saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]),
            200,
            id="animated WebP",
        ),
        pytest.param(
            saved(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), 200, id="pages"
        ),
        pytest.param(saved(FRAMES[0], "GIF"), 415, id="GIF"),
        pytest.param(b"%PDF-1.7", 415, id="PDF"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, id="SVG"),
        pytest.param(b"", 400, id="empty"),
        pytest.param(saved(RGB)[:-30], 400, id="truncated"),
        pytest.param(saved(RGB, "JPEG")[:300], 400, id="truncated JPEG"),
        pytest.param(png_that_claims(20_000, 20_000), 413, id="20000x20000"),
        pytest.param(png_that_claims(2**31 - 1, 2**31 - 1), 413, id="bomb"),
        pytest.param(png_that_claims(0, 0), 400, id="0x0"),
        pytest.param(bytes(2_000_001), 413, id="too many bytes"),
    ],
)
def test_each_kind_of_picture_is_answered_as_designed(
    api: FastAPI, data: bytes, status: int
) -> None:
    answer = ask(api, data)
    assert answer.status_code == status
    assert says_what_to_do(answer)


def test_a_picture_that_lies_on_its_side_is_turned_upright(api: FastAPI) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    answer = ask(api, saved(RGB.resize((60, 20)), "JPEG", exif=exif), params={"map": "png"})
    assert answer.status_code == 200
    upright = Image.open(io.BytesIO(base64.b64decode(answer.json()["map_png"])))
    assert upright.size == (20, 60)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32 - 1))
def test_a_damaged_file_is_inspected_or_refused_with_a_remedy(api: FastAPI, seed: int) -> None:
    answer = ask(api, mutated(seed))
    assert answer.status_code in {200, 400, 413, 415}
    assert says_what_to_do(answer)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    content_type=st.one_of(
        st.sampled_from(
            [
                "multipart/form-data",
                "multipart/form-data; boundary=",
                "multipart/form-data; boundary=x",
                'multipart/form-data; boundary="x; y"',
                "image/png",
                "text/html",
                "",
            ]
        ),
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40),
    ),
    body=st.one_of(
        st.binary(max_size=200),
        st.builds(
            lambda name, data: (
                b'--x\r\nContent-Disposition: form-data; name="a"; filename="'
                + name
                + b'"\r\n\r\n'
                + data
                + b"\r\n--x--\r\n"
            ),
            st.binary(max_size=20),
            st.binary(max_size=50),
        ),
    ),
    accept=st.sampled_from(["image/png", "*/*", "", ",;"]),
)
def test_a_body_without_an_image_is_refused_with_a_remedy_whatever_its_type(
    api: FastAPI, content_type: str, body: bytes, accept: str
) -> None:
    answer = ask(api, body, headers={"Content-Type": content_type, "Accept": accept})
    assert answer.status_code in {400, 415, 422}
    assert says_what_to_do(answer)


@settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
@given(picture=st.text(max_size=10), timeout=st.text("0123456789-.e ", max_size=25))
def test_a_parameter_is_obeyed_or_refused_with_a_remedy(
    api: FastAPI, picture: str, timeout: str
) -> None:
    """A deadline that is too short is 408 or 503."""
    answer = ask(api, saved(FRAMES[0]), params={"map": picture}, headers={"X-Timeout-Ms": timeout})
    assert answer.status_code in {200, 408, 422, 503}
    assert says_what_to_do(answer)
