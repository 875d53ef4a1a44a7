"""Pictures in S3, read from real servers: moto's for what works, rclone's for who is refused."""

import hashlib
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from apt_ray.data.folders import Category, find_categories, support_hash
from apt_ray.devtools.local_stack import free_ports
from apt_ray.errors import DataError
from apt_ray.files import location, s3_client
from apt_ray.images import read_image
from apt_ray.validation.evaluation import TestSet

BUCKET = "pictures"
RCLONE = Path(sys.executable).parent / "rclone"


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """boto3 sees these settings and none of those of whoever runs the tests."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret")
    s3_client.cache_clear()
    yield monkeypatch
    s3_client.cache_clear()


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """The address of a real S3 server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def uploaded(credentials: pytest.MonkeyPatch, moto: str, category: Category) -> str:
    """`s3://` of two categories: a sample one, part of it, and one of more objects than a page."""
    credentials.setenv("AWS_ENDPOINT_URL_S3", moto)
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    few = [image for image in category.test if image.is_anomalous][:2]
    few += [image for image in category.test if not image.is_anomalous][:2]
    masks = [image.mask for image in few if image.mask is not None]
    for path in (*category.good[:3], *(image.path for image in few), *masks):
        key = path.relative_to(category.root.parent).as_posix()
        client.put_object(Bucket=BUCKET, Key=f"line/{key}", Body=path.read_bytes())
    client.put_object(Bucket=BUCKET, Key=f"line/{category.name}/train/good/", Body=b"")
    return f"s3://{BUCKET}/line"


def test_a_category_in_s3_is_that_of_the_disk(uploaded: str, category: Category) -> None:
    (found,) = find_categories(location(uploaded))
    assert str(found.root) == f"{uploaded}/{category.name}"
    assert [path.name for path in found.good] == [path.name for path in category.good[:3]]
    assert found.has_masks
    assert find_categories(location(f"{uploaded}/{category.name}")) == [found]
    # What another machine gets to see reads just as well.
    travelled = pickle.loads(pickle.dumps(found))  # noqa: S301 (our own bytes)
    assert travelled == found
    for here, there in zip(category.good, travelled.good, strict=False):
        assert there.read_bytes() == here.read_bytes()
    assert support_hash(travelled.good) == support_hash(category.good[:3])
    test = TestSet.read(found)
    assert test.masks is not None
    assert sum(mask.any() for mask in test.masks) == 2


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://nowhere/line", "it is not there .NoSuchBucket.: check bucket and prefix"),
        (f"s3://{BUCKET}/else", "is not a folder: check bucket and prefix"),
        ("s3://", "names no bucket: give s3://bucket/prefix"),
    ],
)
def test_a_wrong_address_is_named(uploaded: str, uri: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_categories(location(uri))


def test_an_object_that_went_away_is_named(uploaded: str) -> None:
    with pytest.raises(DataError, match=r"cannot read s3://pictures/line/x\.png: it is not there"):
        read_image(location(f"{uploaded}/x.png"))


def test_without_credentials_the_remedy_is_said(credentials: pytest.MonkeyPatch, moto: str) -> None:
    credentials.setenv("AWS_ENDPOINT_URL_S3", moto)
    credentials.delenv("AWS_ACCESS_KEY_ID")
    credentials.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DataError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        find_categories(location(f"s3://{BUCKET}/line"))


@pytest.fixture
def rclone(credentials: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder of the buckets of an S3 server that knows one secret."""
    (port,) = free_ports(1)
    served = tmp_path / "served"
    served.mkdir()
    server = subprocess.Popen(
        [
            *(RCLONE, "serve", "s3", served, "--addr", f"127.0.0.1:{port}"),
            *("--auth-key", "somebody,the right one", "--config", tmp_path / "rclone.conf"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port)
        credentials.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
        yield served
    finally:
        server.terminate()
        server.wait(10)


def test_wrong_credentials_are_refused_and_right_ones_read_page_by_page(
    rclone: Path, credentials: pytest.MonkeyPatch
) -> None:
    folder = rclone / BUCKET / "cup" / "good"
    folder.mkdir(parents=True)
    for index in range(1005):
        (folder / f"{index:04d}.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"access is refused \(\w+\): check AWS_ACCESS_KEY_ID"):
        find_categories(location(f"s3://{BUCKET}"))
    credentials.setenv("AWS_SECRET_ACCESS_KEY", "the right one")
    s3_client.cache_clear()
    (cup,) = find_categories(location(f"s3://{BUCKET}"))
    assert len(cup.good) == 1005
    assert cup.good[-1].read_bytes() == b"x"


def test_a_server_that_is_away_is_named(credentials: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    credentials.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
    credentials.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(DataError, match="check the network, AWS_DEFAULT_REGION and"):
        find_categories(location(f"s3://{BUCKET}"))


class BreakingProxy:
    """Passes bytes on to a server, but cuts the first `breaks` long answers in their middle."""

    def __init__(self, target: str, breaks: int) -> None:
        self._target = ("127.0.0.1", int(target.rpartition(":")[2]))
        self._breaks = breaks
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut = 0
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _serve(self) -> None:
        """One connection after the other, one request each: all that the test sends."""
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client, socket.create_connection(self._target) as server:
                request = client.recv(65536).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
                server.sendall(request)
                answer = b"".join(iter(lambda server=server: server.recv(65536), b""))
                body = answer.index(b"\r\n\r\n") + 4 if answer else 0
                if len(answer) - body > 5000 and self.cut < self._breaks:
                    self.cut += 1
                    answer = answer[: body + 3000]
                client.sendall(answer)


@pytest.mark.parametrize("breaks", [2, 99])
def test_a_broken_transfer_is_begun_again_and_never_half_read(
    uploaded: str, credentials: pytest.MonkeyPatch, moto: str, category: Category, breaks: int
) -> None:
    proxy = BreakingProxy(moto, breaks)
    try:
        credentials.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        s3_client.cache_clear()
        path = location(f"{uploaded}/{category.name}/train/good/{category.good[0].name}")
        if breaks == 99:
            with pytest.raises(DataError, match=r"broke off 4 times .*check the network"):
                path.read_bytes()
            assert proxy.cut == 4
        else:
            expected = hashlib.sha256(category.good[0].read_bytes()).digest()
            assert hashlib.sha256(path.read_bytes()).digest() == expected
            assert proxy.cut == 2
    finally:
        s3_client.cache_clear()
        proxy.close()


def _wait_for(port: int) -> None:
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    pytest.fail(f"nothing listens on port {port}")
