"""Questions to servers, which come back within seconds, and which servers are named."""

import json
import os
import ssl
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from apt_ray.doctor.findings import Setup

_SECONDS = 5.0
_MAX_BYTES = 2**20
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Unanswered(Exception):
    """Nothing that speaks HTTP answers there; says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came back.

    Attributes:
        ahead_s: by how much the server's clock is ahead of this one, None if it does not say.
    """

    status: int
    body: bytes
    ahead_s: float | None

    def json(self) -> Any:
        """The body; None if it is no JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def said(self) -> str:
        """The body's beginning, in one line."""
        return " ".join(self.body.decode(errors="replace").split())[:200]


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """A server that flags or environment name; `url` has no credentials."""

    name: str
    url: str
    host: str
    port: int


class _NoRedirects(HTTPRedirectHandler):
    """A token goes to whom it was meant for, and to nobody who is named in an answer."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


def ask(url: str, headers: Mapping[str, str] | None = None, *, authority: str = "") -> Answer:
    """GET, by the proxy that the environment names, whatever the status.

    Args:
        authority: file of the certificates that are trusted; empty means the system's.

    Raises:
        Unanswered: Nothing does, or not by HTTP.
    """
    try:
        context = ssl.create_default_context(cafile=authority or None)
        opener = build_opener(_NoRedirects, HTTPSHandler(context=context))
        request = Request(url, headers={"User-Agent": "apt-ray doctor", **(headers or {})})
        started = time.time()
        try:
            response = opener.open(request, timeout=_SECONDS)
        except HTTPError as error:
            response = error
        with response:
            body = response.read(_MAX_BYTES)
            date = response.headers.get("Date")
            status = response.status or 0
    except URLError as error:
        raise Unanswered(str(error.reason)) from error
    except (OSError, HTTPException, ValueError) as error:
        raise Unanswered(str(error) or type(error).__name__) from error
    return Answer(status=status, body=body, ahead_s=_ahead(date, started, time.time()))


def _ahead(date: str | None, started: float, ended: float) -> float | None:
    """The server wrote the date at some time between, and cut off parts of a second."""
    try:
        told = parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        return None
    if told + 1 < started:
        return told + 1 - started
    return max(0.0, told - ended)


def split_credentials(url: str) -> tuple[str, dict[str, str]]:
    """An address without its credentials, and the header that carries them."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    bare = urlunsplit(parts._replace(netloc=host)).rstrip("/")
    return bare, basic(*map(unquote, user.partition(":")[::2])) if at else {}


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def mlflow_address(setup: Setup) -> str:
    return (setup.mlflow or os.environ.get("MLFLOW_TRACKING_URI") or "").strip().rstrip("/")


def ray_address() -> str:
    """Of Ray's dashboard, which also takes jobs; empty if none is named."""
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or ""
    return address.rstrip("/") if address.startswith(("http://", "https://")) else ""


def s3_endpoint() -> str:
    """Of an S3 server other than Amazon's."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if address := os.environ.get(name):
            return address.rstrip("/")
    return ""


def named_servers(setup: Setup) -> Iterator[Named]:
    """The servers that are to be asked."""
    addresses = {
        "MLflow": mlflow_address(setup),
        "Ray's dashboard and job server": ray_address(),
        "S3": s3_endpoint(),
        "fleet": (setup.fleet or "").rstrip("/"),
    }
    for name, address in addresses.items():
        try:
            url, _ = split_credentials(address)
            parts = urlsplit(url)
            port = parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
        except ValueError:
            continue  # no address: whoever asks there says so
        if parts.scheme in _DEFAULT_PORTS and parts.hostname:
            yield Named(name=name, url=url, host=parts.hostname, port=port)
