"""What the benchmarks of serving share: a fleet on this machine, a client, the bare detector."""

import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import torch

from apt_ray.backbone import load_backbone
from apt_ray.config import BackboneSpec, FitSettings
from apt_ray.data.folders import find_categories
from apt_ray.data.samples import write_samples
from apt_ray.detector import Detector
from apt_ray.fitting import fit
from apt_ray.images import decode_image
from apt_ray.local_stack import LocalStack, command_environment, free_ports
from apt_ray.prompt_set import PromptSet

CATEGORY = "washer"


def prepare(folder: Path, backbone: str) -> tuple[PromptSet, bytes]:
    """A prompt set of 4 shots after a few steps, and a picture to inspect."""
    write_samples(folder / "samples")
    category = next(c for c in find_categories(folder / "samples") if c.name == CATEGORY)
    spec = BackboneSpec() if backbone == "builtin" else _random_weights(folder, backbone)
    prompt_set = fit(
        CATEGORY,
        category.support_set(4, seed=0),
        FitSettings(steps=2),
        backbone=load_backbone(spec),
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


@contextmanager
def fleet(
    folder: Path, prompt_set: PromptSet, *, haproxy: bool, threads: int, max_queue: int = 64
) -> Iterator[str]:
    """The address of a fleet with one category and one replica."""
    from apt_ray.registry import Registry

    with tempfile.TemporaryDirectory(dir="/tmp", prefix="apt-bench-") as private:
        # Ray makes its workers nice by default; the bare side is not, and both share the machine.
        ray_env = {"RAY_worker_niceness": "0"} | (_haproxy(Path(private)) if haproxy else {})
        stack = LocalStack(folder / "stack", ray_env=ray_env)
        stack.start()
        try:
            registry = Registry(stack.environment["MLFLOW_TRACKING_URI"])
            registry.register(prompt_set, pictures={}, trials=[])
            (port,) = free_ports(1)
            file = folder / "fleet.yaml"
            settings = {
                "categories": {CATEGORY: {"threshold": 1.0}},
                "defaults": {
                    "threads": threads,
                    "max_queue": max_queue,
                    "autoscaling": {"max_replicas": 1},
                },
                "registry": {"cache": str(folder / "cache")},
            }
            file.write_text(json.dumps(settings))
            command = ["-W", "ignore", "-m", "serving.fleet", "deploy", str(file)]
            subprocess.run(
                [sys.executable, *command, "--http-port", str(port)],
                env=command_environment() | stack.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=True,
            )
            yield f"http://127.0.0.1:{port}"
        finally:
            stack.stop()


class Client:
    """One kept-alive connection."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)

    def inspect(self, data: bytes) -> int:
        """The status of the answer, whose body is read."""
        headers = {"Content-Type": "image/png"}
        self._connection.request("POST", f"/v1/{CATEGORY}/inspect", data, headers)
        response = self._connection.getresponse()
        response.read()
        return response.status


def images_per_second(url: str, data: bytes, *, concurrency: int, seconds: float) -> float:
    """Answers of 200 a second, from this many connections that each ask again at once."""
    until = time.perf_counter() + seconds

    def ask() -> int:
        client, good = Client(url), 0
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
        "  protocol_version='HTTP/1.1'\n"
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


def write(path: Path | None, result: object) -> None:
    """Print a result, and write it if a path is given."""
    text = json.dumps(result, indent=2)
    print(text)
    if path:
        path.write_text(text + "\n")


def _haproxy(private: Path) -> dict[str, str]:
    """Ray's HAProxy mode, with files and ports of its own."""
    metrics, stats = free_ports(2)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(private / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(private / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(private),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(private / "server-state"),
    }


def _random_weights(folder: Path, name: str) -> BackboneSpec:
    """A published architecture without its weights: its speed is that of the real one."""
    from apt_ray.torchvision_guard import import_open_clip

    path = folder / f"{name}.pt"
    if not path.exists():
        torch.save(import_open_clip().create_model(name).state_dict(), path)
    return BackboneSpec(name=name, pretrained=os.fspath(path), quick_gelu=False)
