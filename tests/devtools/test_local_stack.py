import os
import shlex
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request

import pytest

from apt_ray.devtools.local_stack import LocalStack, Server, command_environment, fetch, free_ports
from apt_ray.errors import AptError


def launch_python(code: str, folder: Path) -> Server:
    command = [sys.executable, "-u", "-c", code]
    return Server.launch(
        "test", command, url="http://127.0.0.1:1", log=folder / "log", env=os.environ
    )


def wait_for_output(server: Server) -> None:
    deadline = time.monotonic() + 30
    while not server.log.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalStack]:
    """In a folder whose name means something in an address, where others need a proxy."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    stack = LocalStack(tmp_path / "a b%20c#d?e" / "stack")
    stack.start()
    yield stack
    stack.stop()


def test_both_servers_answer_until_another_process_stops_them(stack: LocalStack) -> None:
    environment = {**command_environment(), **stack.environment}
    dashboard = stack.environment["RAY_API_SERVER_ADDRESS"]
    token_path = Path(stack.environment["RAY_AUTH_TOKEN_PATH"])

    # Ray runs a job, and only for those who hold the token.
    submit = ["ray", "job", "submit", "--submission-id", "probe", "--"]
    entrypoint = ["python", "-c", "raise SystemExit(3)"]
    subprocess.run(submit + entrypoint, env=environment, capture_output=True, check=False)
    job = stack.wait_for_job("probe")
    assert (job["status"], job["driver_exit_code"]) == ("FAILED", 3)
    with pytest.raises(AptError, match="401"):
        fetch(Request(f"{dashboard}/api/jobs/"))
    assert stat.S_IMODE(token_path.stat().st_mode) == 0o600

    assert fetch(Request(f"{stack.environment['MLFLOW_TRACKING_URI']}/health")) == b"OK"

    # All that it keeps lies in its folder.
    client = """
from mlflow import MlflowClient
client = MlflowClient()
client.log_text(client.create_run("0").info.run_id, "x", "x.txt")
"""
    python = [sys.executable, "-c", client]
    subprocess.run(python, env=environment, capture_output=True, check=True)
    assert (stack.folder / "mlflow/mlflow.db").exists()
    assert list((stack.folder / "mlflow/artifacts").rglob("x.txt"))
    assert list(stack.folder.parent.parent.iterdir()) == [stack.folder.parent]

    # A shell that sources `env` has the same settings.
    shown = subprocess.run(
        ["sh", "-c", f". {shlex.quote(str(stack.folder))}/env && echo $MLFLOW_TRACKING_URI"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == stack.environment["MLFLOW_TRACKING_URI"]

    found = LocalStack(stack.folder)
    with pytest.raises(AptError, match="already up"):
        found.start()
    ray_folder = found.ray_folder
    assert ray_folder is not None
    assert ray_folder.exists()
    assert sorted(found.stop()) == ["MLflow", "Ray"]

    assert not stack.is_running
    assert not ray_folder.exists()
    assert not token_path.exists()
    assert LocalStack(stack.folder).stop() == []


def test_server_that_ends_at_once_shows_its_log(tmp_path: Path) -> None:
    server = launch_python("raise SystemExit('the port is taken')", tmp_path)
    with pytest.raises(AptError, match=r"has ended[\s\S]*the port is taken"):
        server.wait_until_ready("/health")


def test_server_that_ignores_the_request_to_end_is_killed(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    server = launch_python(f"{code}; print('up'); time.sleep(600)", tmp_path)
    wait_for_output(server)
    server.terminate()
    server.wait_until_ended(timeout_s=0.5)
    assert not server.is_running
    assert server.process is not None
    assert server.process.returncode == -9


def test_process_that_only_has_the_pid_of_a_server_is_left_alone(tmp_path: Path) -> None:
    stranger = launch_python("print('up'); import time; time.sleep(600)", tmp_path)
    wait_for_output(stranger)
    server = Server(
        name="gone", url=stranger.url, pid=stranger.pid, started="earlier", log=stranger.log
    )
    try:
        server.terminate()
        server.wait_until_ended(timeout_s=0)
        time.sleep(0.3)
        assert stranger.is_running
    finally:
        stranger.terminate()
        stranger.wait_until_ended()


def test_free_ports_differ_and_lie_outside_of_those_that_ray_takes() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_ports(1)[0]))
        ports = free_ports(50)
        assert taken.getsockname()[1] not in ports
    assert len(set(ports)) == 50
    assert all(20_000 <= port < 32_768 for port in ports)
