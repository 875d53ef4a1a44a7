"""Files: images in S3 come from real servers, moto's for what works, rclone's for refusals."""

import os
import pickle
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePath

import boto3
import pytest
from moto.server import ThreadedMotoServer

from apt_ray.data.folders import Category, find_categories, support_hash
from apt_ray.devtools.local_stack import free_ports
from apt_ray.errors import DataError, WriteError
from apt_ray.files import (
    Location,
    S3Path,
    files_below,
    is_within,
    location,
    open_file,
    put,
    read_file,
    read_part,
    remove,
    s3_client,
    sizes,
    write_json,
    write_whole,
    writing,
)
from apt_ray.images import read_image
from apt_ray.validation.evaluation import TestSet
from tests.disks import full_disk
from tests.servers import FaultyS3

BUCKET = "images"
RCLONE = Path(sys.executable).parent / "rclone"

ASKING: dict[str, Callable[[Location], object]] = {
    "is_dir": lambda path: path.is_dir(),
    "is_file": lambda path: path.is_file(),
    "iterdir": lambda path: list(path.iterdir()),
    "read_bytes": lambda path: path.read_bytes(),
}
"""All that asks S3."""


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


@pytest.fixture
def requests(uploaded: str) -> list[str]:
    """The operations that S3 has been asked for."""
    asked: list[str] = []
    s3_client().meta.events.register(
        "before-call.s3", lambda model, **_: asked.append(model.name), unique_id="counting"
    )
    return asked


@pytest.mark.parametrize(
    "text", ["bucket", "bucket/cup", "bucket/cup/a.b.PNG", "bucket/./cup//good/", "bucket/.hidden"]
)
def test_what_needs_no_server_is_as_of_a_local_path(text: str) -> None:
    path, local = location(f"s3://{text}"), Path(text)
    assert str(path) == f"s3://{local}"
    assert path.parts == local.parts
    assert (path.name, path.stem, path.suffix) == (local.name, local.stem, local.suffix)
    assert str(path / "x" / "y/z.png") == f"s3://{local}/x/y/z.png"
    assert (path / "x").parent == path
    assert hash(path) == hash(location(str(path)))
    assert {path: 1}[location(f"s3://{text}/")] == 1


def test_paths_sort_as_local_ones_do() -> None:
    texts = ["b/x", "b", "b/x-y/1", "b/x/1", "a/z", "b/X"]
    paths = sorted(location(f"s3://{text}") for text in texts)
    assert [str(path) for path in paths] == [f"s3://{path}" for path in sorted(map(Path, texts))]


def test_above_the_bucket_there_is_nothing() -> None:
    bucket = location(f"s3://{BUCKET}")
    assert bucket.parent == bucket
    assert bucket.name == BUCKET


def test_what_s3_cannot_do_is_not_there() -> None:
    path = location(f"s3://{BUCKET}/x.png")
    assert isinstance(path, S3Path)
    assert not isinstance(path, PurePath)
    assert {name for name in dir(path) if not name.startswith("_")} == {
        *("parts", "name", "stem", "suffix", "parent"),
        *ASKING,
    }
    with pytest.raises(TypeError, match=r"os\.PathLike object, not S3Path"):
        os.fspath(path)  # type: ignore[call-overload]
    local: object = Path(str(path))
    assert path != local
    with pytest.raises(TypeError, match="not supported between"):
        sorted([path, local])  # type: ignore[type-var]


def test_folders_and_objects_are_told_apart(uploaded: str, requests: list[str]) -> None:
    client = boto3.client("s3")
    # The console's mark of a folder, and keys that no path can name.
    for key in ("odd/", "odd/x.png", "odd/more/y.png", "odd//z.png", "odd/./z.png", "oddity"):
        client.put_object(Bucket=BUCKET, Key=key, Body=b"body")
    folder = location(f"s3://{BUCKET}/odd")
    for path, kind in (
        (location(f"s3://{BUCKET}"), "folder"),
        (folder, "folder"),
        (folder / "more", "folder"),
        (folder / "x.png", "file"),
        (folder / "x", "nothing"),
        (folder / "x.png/y", "nothing"),
    ):
        assert (path.is_dir(), path.is_file()) == (kind == "folder", kind == "file"), path
    assert list((folder / "none").iterdir()) == []
    requests.clear()
    found = {path.name: (path.is_dir(), path.is_file()) for path in folder.iterdir()}
    assert found == {"more": (True, False), "x.png": (False, True)}
    assert requests == ["ListObjectsV2"], "a listing says what its entries are"
    assert (folder / "x.png").read_bytes() == b"body"
    assert read_file(folder / "x.png") == b"body"


def test_a_local_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*x\.png: No such file"):
        read_file(tmp_path / "x.png")


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
        ("s3:///line", "names no bucket: give s3://bucket/prefix"),
        ("s3://no such/line", "cannot name an object: check bucket and prefix"),
    ],
)
def test_a_wrong_address_is_named(uploaded: str, uri: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_categories(location(uri))


def test_an_object_that_went_away_is_named(uploaded: str) -> None:
    with pytest.raises(DataError, match=r"cannot read s3://images/line/x\.png: it is not there"):
        read_image(location(f"{uploaded}/x.png"))


def test_a_bucket_cannot_be_read(uploaded: str) -> None:
    with pytest.raises(DataError, match="cannot name an object"):
        location(f"s3://{BUCKET}").read_bytes()


def test_files_are_written_and_read_in_parts_as_local_ones(uploaded: str, tmp_path: Path) -> None:
    for root in (location(uploaded) / "new", tmp_path):
        path = root / "deep" / "file.bin"
        put(path, bytes(range(100)))
        put(path, bytes(range(200)))
        assert path.read_bytes() == bytes(range(200))
        assert read_part(path, 150, 20) == bytes(range(150, 170))
        with open_file(path, ahead=16) as file:
            assert file.read(3) == b"\0\1\2"
            file.seek(-5, os.SEEK_END)
            assert file.read() == bytes(range(195, 200))
            assert file.seek(10) == 10
            assert file.read(40) == bytes(range(10, 50))
        assert list(files_below(root)) == [str(path)]
        assert sizes(path.parent) == {"file.bin": 200}
        assert sizes(root) == sizes(root / "none") == {}
        remove(path)
        remove(path)
        assert sizes(path.parent) == {}
        put(path, bytes(range(200)))
        with pytest.raises(DataError, match="cannot read"):
            open_file(root / "none", ahead=16)
        with pytest.raises(DataError, match="cannot read"):
            read_part(root / "none", 0, 1)
    with pytest.raises(WriteError, match=r"cannot write s3://nowhere/x: it is not there"):
        put("s3://nowhere/x", b"")
    with pytest.raises(WriteError, match=r"cannot remove s3://nowhere/x: it is not there"):
        remove("s3://nowhere/x")


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
def test_a_bucket_that_is_missing_is_named(
    uploaded: str, ask: Callable[[Location], object]
) -> None:
    with pytest.raises(DataError, match=r"s3://nowhere/x: it is not there \(NoSuchBucket\)"):
        ask(location("s3://nowhere/x"))


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
@pytest.mark.parametrize(
    "missing",
    [("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), ("AWS_SECRET_ACCESS_KEY",), ()],
    ids=["both", "secret", "profile"],
)
def test_without_credentials_the_remedy_is_said(
    credentials: pytest.MonkeyPatch,
    moto: str,
    missing: tuple[str, ...],
    ask: Callable[[Location], object],
) -> None:
    credentials.setenv("AWS_ENDPOINT_URL_S3", moto)
    for name in missing:
        credentials.delenv(name)
    if not missing:
        credentials.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(DataError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        ask(location(f"s3://{BUCKET}/line"))


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
    for ask in (find_categories, *ASKING.values()):
        with pytest.raises(DataError, match=r"access is refused \(\w+\): check AWS_ACCESS_KEY_ID"):
            ask(location(f"s3://{BUCKET}/cup"))
    credentials.setenv("AWS_SECRET_ACCESS_KEY", "the right one")
    s3_client.cache_clear()
    (cup,) = find_categories(location(f"s3://{BUCKET}"))
    assert len(cup.good) == 1005
    assert cup.good[-1].read_bytes() == b"x"


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:{port}", "127.0.0.1:{port}"])
def test_a_server_that_is_away_is_named(
    credentials: pytest.MonkeyPatch, endpoint: str, ask: Callable[[Location], object]
) -> None:
    (port,) = free_ports(1)
    credentials.setenv("AWS_ENDPOINT_URL_S3", endpoint.format(port=port))
    credentials.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(DataError, match="check the network, AWS_DEFAULT_REGION and"):
        ask(location(f"s3://{BUCKET}/x"))


@pytest.fixture
def faulty(
    uploaded: str, credentials: pytest.MonkeyPatch, moto: str
) -> Iterator[Callable[..., FaultyS3]]:
    """Puts a server with faults before the one where things are uploaded."""
    with ExitStack() as running:

        def put_before(**faults: int) -> FaultyS3:
            server = running.enter_context(FaultyS3(moto, **faults))
            credentials.setenv("AWS_ENDPOINT_URL_S3", server.url)
            s3_client.cache_clear()
            return server

        yield put_before


def test_a_broken_transfer_is_begun_again_and_never_half_read(
    uploaded: str, faulty: Callable[..., FaultyS3], category: Category
) -> None:
    path = location(f"{uploaded}/{category.name}/train/good/{category.good[0].name}")
    server = faulty(breaks=2)
    assert path.read_bytes() == category.good[0].read_bytes()
    assert server.faults == 2
    server = faulty(breaks=99)
    with pytest.raises(DataError, match=r"broke off 4 times .*check the network"):
        path.read_bytes()
    assert server.faults == 4


def test_throttled_requests_are_repeated(
    uploaded: str, faulty: Callable[..., FaultyS3], category: Category
) -> None:
    server = faulty(slow_downs=2)
    (found,) = find_categories(location(uploaded), [category.name])
    assert found.good[0].read_bytes() == category.good[0].read_bytes()
    assert server.faults == 2


def test_what_stays_throttled_is_named(uploaded: str, faulty: Callable[..., FaultyS3]) -> None:
    server = faulty(slow_downs=99)
    with pytest.raises(DataError, match=r"S3 has too much to do \(SlowDown\): wait, then retry"):
        find_categories(location(uploaded))
    assert server.faults == 4


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def nobody() -> Iterator[None]:
    """Files are written by somebody whom permissions hold, also where root runs the tests."""
    before = os.geteuid()
    os.seteuid(65534 if before == 0 else before)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_file_is_written_with_its_folders_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "file"
    with umask(0o027):
        for content, expected in ((b"one", b"one"), ("zwei\u00df", b"zwei\xc3\x9f"), ("", b"")):
            write_whole(file, content)
            assert file.read_bytes() == expected
    write_json(tmp_path / "file.json", {"a": [1]})
    assert (tmp_path / "file.json").read_text() == '{\n  "a": [\n    1\n  ]\n}\n'
    assert (mode(file), mode(file.parent)) == (0o640, 0o750)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "file", "file.json"]


def test_a_private_file_is_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "file"
    with umask(0):
        write_whole(file, b"x", private=True)
        assert (mode(file), mode(file.parent)) == (0o600, 0o700)
        file.chmod(0o644)
        write_whole(file, b"y", private=True)
    assert (file.read_bytes(), mode(file)) == (b"y", 0o600)


def _begin_file(place: Path) -> None:
    place.write_bytes(b"new")


def _begin_folder(place: Path) -> None:
    (place / "new").mkdir(parents=True)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("begin", [_begin_file, _begin_folder, id])
def test_what_is_not_finished_leaves_all_as_it_was(
    tmp_path: Path, begin: Callable[[Path], None], error: type[BaseException]
) -> None:
    write_whole(tmp_path / "file", b"old")

    def break_off() -> None:
        with writing(tmp_path / "file") as place:
            begin(place)
            raise error

    with pytest.raises(WriteError if error is OSError else error):
        break_off()
    assert (tmp_path / "file").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_appears_whole_and_replaces_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "folder"
    with writing(folder) as place:
        (place / "b").mkdir(parents=True)
        assert not folder.exists()
    assert [path.name for path in folder.iterdir()] == ["b"]
    with pytest.raises(WriteError, match="not empty"), writing(folder) as place:
        (place / "c").mkdir(parents=True)
    assert [path.name for path in folder.iterdir()] == ["b"]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_link_stays_and_leads_to_what_is_new(tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "elsewhere" / "target"
    link.symlink_to(target)
    for content in (b"new", b"newer"):
        write_whole(link, content)
        assert link.readlink() == target
        assert target.read_bytes() == content


def test_pipes_and_devices_are_written_to(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    write_whole(Path(f"/dev/fd/{writer}"), b"into the pipe")
    assert os.read(reader, 100) == b"into the pipe"
    os.close(reader)
    os.close(writer)
    write_whole(Path("/dev/null"), b"x")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(WriteError, match=r"cannot write /dev/full \(No space left"):
        write_whole(Path("/dev/full"), b"x")


def test_a_full_disk_is_named_and_harms_nothing(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_whole(file, b"old")
    with full_disk(1000), pytest.raises(WriteError, match=r"cannot write .*too large\): make room"):
        write_whole(file, bytes(2000))
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


REMEDY = "make room, mend its permissions, or choose another place"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file/x", "a file is where a folder should be"),
        ("file/more/x", "a file is where a folder should be"),
        ("folder", "Is a directory"),
    ],
)
def test_a_place_that_is_something_else_is_named(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError) as raised:
        write_whole(tmp_path / name, b"x")
    assert str(raised.value) == f"cannot write {tmp_path / name} ({reason}): {REMEDY}"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize("name", ["x", "folder/x"])
def test_a_folder_that_is_closed_is_named(tmp_path: Path, name: str) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    with pytest.raises(WriteError) as raised, nobody():
        write_whole(closed / name, b"x")
    assert str(raised.value) == f"cannot write {closed / name} (Permission denied): {REMEDY}"


WRITE_OFTEN = """
import sys
from pathlib import Path
from apt_ray.files import write_whole

for _ in range(200):
    write_whole(Path(sys.argv[1]), sys.argv[2] * 100_000)
"""


def test_of_many_writers_one_wins(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_whole(file, "-" * 100_000)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITE_OFTEN, file, letter]) for letter in "abc"
    ]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        content = file.read_text()
        seen.add(content[0])
        assert content == content[0] * 100_000
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert seen & set("abc")
    assert list(tmp_path.iterdir()) == [file]


def _wait_for(port: int) -> None:
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    pytest.fail(f"nothing listens on port {port}")


def test_what_lies_within_a_folder_is_told_wherever_links_lead(tmp_path: Path) -> None:
    (tmp_path / "day").mkdir()
    (tmp_path / "link").symlink_to("day")
    for path in ("day", "day/out", "link", "link/out", "day/../day/out"):
        assert is_within(tmp_path / path, tmp_path / "day")
        assert is_within(tmp_path / path, tmp_path / "link")
    for path in ("day2", "", "day/../out"):
        assert not is_within(tmp_path / path, tmp_path / "day")
    assert is_within("s3://line/day/out", "s3://line/day")
    assert not is_within("s3://line/day2", "s3://line/day")
    assert not is_within(tmp_path / "line" / "day", "s3://line/day")
