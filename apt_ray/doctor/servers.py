"""Checks of what this machine is to reach: proxy, Ray, MLflow, S3, fleet, and their clocks."""

import os
import socket
import stat
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from apt_ray.doctor.findings import Finding, Setup, error, ok, skipped, warning
from apt_ray.doctor.http import (
    Answer,
    Unanswered,
    ask,
    basic,
    bearer,
    mlflow_address,
    named_servers,
    ray_address,
    s3_endpoint,
    split_credentials,
)
from apt_ray.errors import AptError
from apt_ray.files import S3Path, location
from apt_ray.machine import expanded, is_loopback

FLEET_TOKEN = "APT_RAY_TOKEN"
"""The variable that holds a token of the fleet."""

_PROBE_S = 5.0
_LATE_S = 30.0
_TOO_LATE_S = 300.0  # a webhook may be so old, and a signature of S3 not much older
_LOOPBACK = "127.0.0.1"


def proxy(setup: Setup) -> Iterator[Finding]:
    """Whether a proxy of the environment stands before servers that it cannot reach."""
    proxies = getproxies_environment()
    if not {"http", "https", "all"} & set(proxies):
        yield ok("none is set")
        return
    # `deploy` asks Ray's dashboard there, whatever is named.
    hosts = {_LOOPBACK: "http"}
    hosts |= {server.host: urlsplit(server.url).scheme for server in named_servers(setup)}
    through = [
        host
        for host, scheme in hosts.items()
        if (scheme in proxies or "all" in proxies) and not proxy_bypass(host)
    ]
    own = [host for host in through if is_loopback(host)]
    if own:
        yield error(
            f"a proxy stands before this machine's own {', '.join(own)}, which it cannot reach",
            f"export no_proxy={','.join([*own, 'localhost'])}, with what stands there already",
        )
    others = [host for host in through if not is_loopback(host)]
    if others:
        yield ok(f"asked through a proxy: {', '.join(others)}")
    elif not own:
        yield ok("no server that is named is asked through the one that is set")


def ray(setup: Setup) -> Iterator[Finding]:
    """Ray's head and dashboard, its token, and its version."""
    head = os.environ.get("RAY_ADDRESS", "")
    head = "" if head.startswith(("http://", "https://")) or head == "auto" else head
    address = ray_address()
    token, complaint = _ray_token()
    if complaint is not None:
        yield complaint
    if not head and not address:
        yield skipped(
            "no cluster is named", "set RAY_API_SERVER_ADDRESS, such as http://127.0.0.1:8265"
        )
        return
    if head:
        yield _head(head)
    if not address:
        return
    try:
        mode = ask(f"{address}/api/authentication_mode").json()
        answer = ask(f"{address}/api/version", bearer(token) if token else None)
    except Unanswered as failure:
        yield error(
            f"no dashboard answers at {address} ({failure})",
            "start Ray with `ray start --head`, or correct RAY_API_SERVER_ADDRESS",
        )
        return
    told = answer.json()
    remedy = (
        "take the token of the cluster's head (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or"
        " ~/.ray/auth_token), with RAY_AUTH_MODE=token"
    )
    if answer.status == 401:
        yield error(f"the cluster at {address} asks for a token, and there is none here", remedy)
    elif answer.status == 403:
        yield error(f"the cluster at {address} refuses the token", remedy)
    elif answer.status != 200 or not isinstance(told, dict) or "ray_version" not in told:
        yield error(
            f"what answers at {address} is not Ray's dashboard (status {answer.status})",
            "correct RAY_API_SERVER_ADDRESS, or look at what stands before it",
        )
    else:
        yield _same_ray(told["ray_version"], address)
        if isinstance(mode, dict) and mode.get("authentication_mode") == "disabled":
            yield warning(
                f"the cluster at {address} runs what anybody sends it",
                "start it with RAY_AUTH_MODE=token in the environment of every node",
            )


def _head(address: str) -> Finding:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    remedy = "start Ray with `ray start --head`, or correct RAY_ADDRESS"
    if not host or not port.isdecimal() or "/" in host:
        return error(f"RAY_ADDRESS ({address}) is not host:port", remedy)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()
    except (OSError, OverflowError) as failure:
        return error(f"no Ray head listens at {address} ({failure})", remedy)
    return ok(f"a head listens at {address}")


def _ray_token() -> tuple[str, Finding | None]:
    """The token that Ray would send, and what is wrong with where it comes from."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, None
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = expanded(Path(named or "~/.ray/auth_token"))
    is_asked_for = bool(named) or os.environ.get("RAY_AUTH_MODE") == "token"
    remedy = "copy the token of the cluster's head there: `umask 077`, then one line in the file"
    try:
        token = path.read_text().strip()
        mode = stat.S_IMODE(path.stat().st_mode)
    except (OSError, UnicodeDecodeError) as failure:
        reason = getattr(failure, "strerror", None) or failure
        complaint = error(f"Ray's token cannot be read from {path} ({reason})", remedy)
        return "", complaint if is_asked_for else None
    if not token:
        return "", error(f"the file of Ray's token, {path}, is empty", remedy)
    if mode & 0o077:
        return token, warning(
            f"others on this machine may read Ray's token ({path} has mode {mode:o}), and with it"
            " run anything on the cluster",
            f"chmod 600 {path}",
        )
    return token, None


def _same_ray(theirs: str, address: str) -> Finding:
    try:
        ours = version("ray")
    except PackageNotFoundError:
        return ok(f"Ray {theirs} answers at {address}; there is none here")
    if ours != theirs:
        return error(
            f"the cluster at {address} has Ray {theirs}, this environment {ours}; they do not mix",
            f"pip install 'ray=={theirs}', or update the cluster",
        )
    return ok(f"Ray {theirs} answers at {address}")


def mlflow(setup: Setup) -> Iterator[Finding]:
    """The registry's server: its answer, its permissions, its version, its store of files."""
    address = mlflow_address(setup)
    if not address:
        yield skipped("no registry is named", "set MLFLOW_TRACKING_URI, or give --mlflow")
        return
    if not address.startswith(("http://", "https://")):
        yield error(
            f"{address!r} is not the address of an MLflow server",
            "set MLFLOW_TRACKING_URI to http://HOST:PORT",
        )
        return
    url, headers = split_credentials(address)
    if not headers:
        headers = _mlflow_credentials()
    authority = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH", "")

    def answer(path: str) -> Answer:
        return ask(url + path, headers, authority=authority)

    try:
        health = answer("/health")
        models = answer("/api/2.0/mlflow/registered-models/search?max_results=1")
        store = answer("/api/2.0/mlflow-artifacts/artifacts")
        told = answer("/version")
    except Unanswered as failure:
        yield error(
            f"no MLflow server answers at {url} ({failure})",
            "trust its certificate: MLFLOW_TRACKING_SERVER_CERT_PATH, SSL_CERT_FILE"
            if "CERTIFICATE" in str(failure)
            else "start one with `mlflow server`, or correct MLFLOW_TRACKING_URI",
        )
        return
    listed = models.json()
    if models.status == 401:
        yield error(
            f"the MLflow server at {url} does not know this user",
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        )
    elif models.status == 403:
        yield error(
            f"the MLflow server at {url} refuses ({models.said})",
            "let its administrator grant this user the models, or add this host to its"
            " --allowed-hosts",
        )
    elif models.status != 200 or not isinstance(listed, dict):
        yield error(
            f"the MLflow server at {url} fails with status {models.status} ({models.said})"
            if health.status == 200
            else f"what answers at {url} is not an MLflow server (status {health.status})",
            "look into the server's log: its database may be away, or of another version"
            " (`mlflow db upgrade`)"
            if health.status == 200
            else "correct MLFLOW_TRACKING_URI, or what stands before the server",
        )
    else:
        yield _same_mlflow(told.body.decode(errors="replace").strip(), url)
        # A server may also leave its store to the clients (--no-serve-artifacts), by 503.
        if store.status != 200 and "serve" not in store.said:
            yield error(
                f"the MLflow server at {url} cannot list its files (status {store.status},"
                f" {store.said})",
                "check the server's own S3 credentials, MLFLOW_S3_ENDPOINT_URL and"
                " --artifacts-destination",
            )


def _mlflow_credentials() -> dict[str, str]:
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return bearer(token)
    user, password = (
        os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD")
    )
    return basic(user, password) if user and password else {}


def _same_mlflow(theirs: str, url: str) -> Finding:
    try:
        ours = version("mlflow")
    except PackageNotFoundError:
        return ok(f"MLflow {theirs} answers at {url}; there is none here")
    if theirs.partition(".")[0] != ours.partition(".")[0]:
        return warning(
            f"the server at {url} has MLflow {theirs}, this environment {ours}",
            f"let both have the same major version: pip install 'mlflow=={theirs}'",
        )
    return ok(f"MLflow {theirs} answers at {url}")


def s3(setup: Setup) -> Iterator[Finding]:
    """Whether images in S3 can be listed with the credentials of the environment."""
    key, secret = (os.environ.get(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    if bool(key) != bool(secret):
        yield error(
            "only one of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY is set",
            "set both, or neither where a profile or a role gives them",
        )
    if setup.s3 is None:
        yield skipped("no bucket is named", "give --s3 s3://BUCKET/PREFIX")
        return
    try:
        place = location(setup.s3)
        if not isinstance(place, S3Path):
            yield error(f"{setup.s3} names no bucket", "give --s3 s3://BUCKET/PREFIX")
            return
        if endpoint := s3_endpoint():
            ask(endpoint)  # boto3 would try for a minute
        found = list(islice(place.iterdir(), 1))
    except Unanswered as failure:
        yield error(
            f"no S3 server answers at {endpoint} ({failure})",
            "correct AWS_ENDPOINT_URL_S3, or start the server",
        )
    except AptError as failure:
        what, _, remedy = str(failure).rpartition(": ")
        yield error(what, remedy)
    else:
        if found:
            yield ok(f"{place} can be listed")
        else:
            yield warning(f"{place} can be listed, and is empty", "check bucket and prefix")


def fleet(setup: Setup) -> Iterator[Finding]:
    """The fleet over HTTP: whether it answers, to whom, and what it serves."""
    if not setup.fleet:
        yield skipped(
            "none is named",
            f"give --fleet http://HOST:PORT; {FLEET_TOKEN} holds a token for it",
        )
        return
    url = setup.fleet.rstrip("/")
    token = os.environ.get(FLEET_TOKEN, "").strip()
    headers = bearer(token) if token else {}
    try:
        health = ask(f"{url}/healthz")
        me = ask(f"{url}/fleet/me", headers)
        status = ask(f"{url}/fleet/status", headers)
        ready = ask(f"{url}/readyz")
    except Unanswered as failure:
        yield error(
            f"no fleet answers at {url} ({failure})",
            "deploy one (`python -m serving.fleet deploy FILE`), or correct --fleet",
        )
        return
    if health.status != 200 or health.json() != {"status": "ok"}:
        yield error(
            f"what answers at {url} is not a fleet (status {health.status})",
            "correct --fleet, or look at `python -m serving.fleet status` and Ray's logs",
        )
        return
    if me.status == 401:
        yield (
            error(
                f"the fleet at {url} does not know the token", "make a new one (docs/operating.md)"
            )
            if token
            else ok(f"a fleet answers at {url}, to those who have a token")
        )
    elif me.status == 200 and not (me.json() or {}).get("needs_token") and not _is_own(url):
        yield warning(
            f"the fleet at {url} answers everybody",
            "give it tokens: `python -m serving.fleet token NAME` (docs/operating.md)",
        )
    told = status.json()
    if status.status == 200 and isinstance(told, dict):
        yield from _served(told, url)
    elif ready.status != 200:
        detail = (ready.json() or {}).get("detail") or ready.said
        yield error(
            f"the fleet at {url} is not ready ({detail})",
            f"ask why with a token that may operate in {FLEET_TOKEN}",
        )
    elif me.status == 200:
        yield ok(f"the fleet at {url} is ready")


def _is_own(url: str) -> bool:
    return is_loopback(urlsplit(url).hostname or "")


def _served(status: dict[str, object], url: str) -> Iterator[Finding]:
    """What the fleet says of itself, to whoever may operate it."""
    registry = status.get("registry")
    if registry != "ok":
        yield warning(
            f"the fleet does not reach its registry ({registry}); it serves what it knew last",
            "start the registry, or look at its address (`deploy --mlflow`)",
        )
    categories = status.get("categories")
    known = categories if isinstance(categories, dict) else {}
    failed = {name: told for name, told in known.items() if told.get("state") == "FAILED"}
    for name, told in failed.items():
        yield error(
            f"{name} is not served as it should be ({told.get('problem') or 'no reason given'})",
            "register a version that can, or roll back (docs/operating.md)",
        )
    waiting = [name for name, told in known.items() if told.get("state") == "LOADING"]
    if waiting:
        yield warning(
            f"still loading: {', '.join(waiting)}", "wait; then look at Ray's logs of the replicas"
        )
    if not failed:
        yield ok(f"the fleet at {url} serves {len(known) - len(waiting)} categories")


def clock(setup: Setup) -> Iterator[Finding]:
    """This machine's clock against those of the servers."""
    servers = list(named_servers(setup))
    if not servers:
        yield skipped("no server is named that it could be compared with")
    for server in servers:
        try:
            ahead_s = ask(server.url).ahead_s
        except Unanswered:
            continue  # another check says so
        if ahead_s is None:
            yield skipped(f"{server.name} does not tell the time")
        elif abs(ahead_s) < _LATE_S:
            yield ok(f"agrees with {server.name}")
        else:
            direction = "behind" if ahead_s > 0 else "ahead of"
            what = f"this clock is {abs(ahead_s):.0f} s {direction} that of {server.name}"
            remedy = "set both by NTP: timedatectl set-ntp true"
            if abs(ahead_s) < _TOO_LATE_S:
                yield warning(what, remedy)
            else:
                yield error(f"{what}: webhooks and S3's signatures are refused", remedy)
