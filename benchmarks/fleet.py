"""What the benchmarks of serving share: a fleet on this machine, a client, the bare detector."""

import base64
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

import psutil
import torch

from apt_ray.config import FitSettings
from apt_ray.data.folders import find_categories
from apt_ray.data.samples.factory import write_samples
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.devtools.local_stack import HOST, LocalStack, Server, command_environment, free_ports
from apt_ray.features.clip import load_backbone
from apt_ray.images import decode_image
from apt_ray.prompts.fit import fit
from benchmarks.common import random_weights

CATEGORY = "washer"
_SERVES_OWN_PROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"}


def prepare(folder: Path, backbone: str) -> tuple[PromptSet, bytes]:
    """A prompt set of 4 shots after a few steps, and an image to inspect."""
    write_samples(folder / "samples")
    category = next(c for c in find_categories(folder / "samples") if c.name == CATEGORY)
    prompt_set = fit(
        CATEGORY,
        category.support_set(4, seed=0),
        FitSettings(steps=2),
        backbone=load_backbone(random_weights(backbone, folder)),
    )
    return prompt_set, category.test[0].path.read_bytes()


def bare(prompt_set: PromptSet, threads: int) -> "BareModel":
    """The detector without anything around it."""
    torch.set_num_threads(threads)
    return BareModel(prompt_set)


class BareModel:
    """Bytes in, inspections out, in this process and thread."""

    def __init__(self, prompt_set: PromptSet) -> None:
        self._detector = Detector(load_backbone(prompt_set.backbone), prompt_set)

    @torch.inference_mode()
    def inspect(self, files: Sequence[bytes]) -> None:
        self._detector.inspect([decode_image(data) for data in files])


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningFleet:
    """Where a fleet answers, its registry, and the process below which its Ray runs."""

    url: str
    tracking_uri: str
    ray_pid: int
    ray_folder: Path

    def replica(self) -> psutil.Process:
        """The process of a replica that serves the category; LookupError while there is none."""
        return self.process(f"ServeReplica:pool-{CATEGORY}")

    def process(self, title: str) -> psutil.Process:
        """A process of Ray whose command line contains `title`; LookupError without any."""
        for process in psutil.Process(self.ray_pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()):
                    return process
        raise LookupError(title)


@contextmanager
def fleet(
    folder: Path,
    prompt_set: PromptSet | Mapping[str, PromptSet],
    *,
    haproxy: bool = True,
    threads: int,
    max_wait_s: float = 60,
    categories: Sequence[str] = (CATEGORY,),
    autoscaling: Mapping[str, object] = MappingProxyType({"max_replicas": 1}),
    settings: Mapping[str, object] = MappingProxyType({}),
) -> Iterator[RunningFleet]:
    """A fleet in which each category has a pool of its own, but for what `settings` say otherwise:
    they stand in the fleet file. A prompt set is of all `categories`, or each has its own."""
    from apt_ray.registry import open_registry

    folder.mkdir(parents=True, exist_ok=True)
    # Ray makes its workers nice by default; the bare side is not, and both share the machine.
    ray_env = {"RAY_worker_niceness": "0"} | ({} if haproxy else _SERVES_OWN_PROXY)
    stack = LocalStack(folder / "stack", ray_env=ray_env)
    stack.start()
    try:
        registry = open_registry(stack.environment["MLFLOW_TRACKING_URI"])
        if isinstance(prompt_set, PromptSet):
            prompt_set = dict.fromkeys(categories, prompt_set)
        for name, each in prompt_set.items():
            registry.register(each.with_category(name), pictures={}, trials=[])
        (port,) = free_ports(1)
        file = folder / "fleet.yaml"
        usual = {
            "categories": {name: {"threshold": 1.0} for name in prompt_set},
            "defaults": {
                "threads": threads,
                "max_wait_s": max_wait_s,
                "autoscaling": dict(autoscaling),
            },
            "registry": {"cache": str(folder / "cache")},
        }
        file.write_text(json.dumps(usual | dict(settings)))
        deploy(stack, file, port)
        yield RunningFleet(
            url=f"http://{HOST}:{port}",
            tracking_uri=stack.environment["MLFLOW_TRACKING_URI"],
            ray_pid=next(server.pid for server in stack.servers if server.name == "Ray"),
            ray_folder=stack.ray_folder or folder,
        )
    finally:
        stack.stop()


def deploy(stack: LocalStack, file: Path, port: int) -> None:
    """Make a stack's cluster serve what a fleet file describes; returns when all is ready."""
    command = ["-W", "ignore", "-m", "serving.fleet", "deploy", str(file)]
    subprocess.run(
        [sys.executable, *command, "--http-port", str(port)],
        env=command_environment() | stack.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )


@contextmanager
def mlflow_models_serve(
    folder: Path, tracking_uri: str, *, threads: int, workers: int = 1
) -> Iterator[str]:
    """The address of MLflow's own server of the version that the fleet serves."""
    (port,) = free_ports(1)
    with Server.launch(
        "model",
        [
            *("mlflow", "models", "serve", "--model-uri", f"models:/apt-{CATEGORY}@champion"),
            *("--env-manager", "local", "--host", HOST, "--port", str(port)),
            *("--workers", str(workers)),
        ],
        url=f"http://{HOST}:{port}",
        log=folder / "mlflow-models-serve.log",
        env=command_environment()
        | {"MLFLOW_TRACKING_URI": tracking_uri, "OMP_NUM_THREADS": str(threads)},
    ) as server:
        server.wait_until_ready("/ping")
        yield server.url


class _Connection:
    """One kept-alive connection."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)

    def _ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> int:
        """The status of the answer, whose body is read."""
        try:
            self._connection.request(method, path, body, headers)
            response = self._connection.getresponse()
        except (http.client.HTTPException, ConnectionError):
            self._connection.close()  # the server has closed it meanwhile: as good as a fresh one
            self._connection.request(method, path, body, headers)
            response = self._connection.getresponse()
        response.read()
        return response.status

    def _post(self, path: str, body: bytes, content_type: str, **headers: str) -> int:
        return self._ask("POST", path, body, **{"Content-Type": content_type}, **headers)


class Client(_Connection):
    """A caller of the fleet."""

    def inspect(self, data: bytes, category: str = CATEGORY, request_id: str | None = None) -> int:
        """Have an image inspected; the status of the answer."""
        headers = {} if request_id is None else {"X-Request-ID": request_id}
        return self._post(f"/v1/{category}/inspect", data, "image/png", **headers)

    def get(self, path: str) -> int:
        """The status of the answer."""
        return self._ask("GET", path)

    def say(self, label: str, category: str, request_id: str) -> int:
        """Give feedback on what was inspected; the status of the answer."""
        body = json.dumps({"request_id": request_id, "label": label}).encode()
        return self._post(f"/v1/{category}/feedback", body, "application/json")


class ModelClient(_Connection):
    """A caller of `mlflow models serve`."""

    def inspect(self, data: bytes) -> int:
        """Have an image inspected; the status of the answer."""
        body = json.dumps({"inputs": [base64.b64encode(data).decode()]}).encode()
        return self._post("/invocations", body, "application/json")


def images_per_second(
    connect: Callable[[], Client | ModelClient], data: bytes, *, concurrency: int, seconds: float
) -> float:
    """Answers of 200 a second, from this many connections that each ask again at once."""
    until = time.perf_counter() + seconds

    def ask() -> int:
        client, good = connect(), 0
        while time.perf_counter() < until:
            good += client.inspect(data) == 200
        return good

    started = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as senders:
        answered = sum(
            future.result() for future in [senders.submit(ask) for _ in range(concurrency)]
        )
    return answered / (time.perf_counter() - started)


@contextmanager
def echo() -> Iterator[str]:
    """A server that reads a request and answers at once: what the client itself costs."""
    program = (
        "import http.server as s\n"
        "class H(s.BaseHTTPRequestHandler):\n"
        "  protocol_version='HTTP/1.1'; wbufsize=-1\n"  # one segment: else Nagle waits 40 ms
        "  def log_message(self,*a): pass\n"
        "  def do_POST(self):\n"
        "    self.rfile.read(int(self.headers['Content-Length']))\n"
        "    self.send_response(200); self.send_header('Content-Length','2')\n"
        "    self.end_headers(); self.wfile.write(b'{}')\n"
        "x=s.ThreadingHTTPServer(('127.0.0.1',0),H); print(x.server_port,flush=True)\n"
        "x.serve_forever()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
