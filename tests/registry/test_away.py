"""The registry away, its artifacts tampered with, and what waits or is cached on disk."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from apt_ray.devtools.local_stack import Server, free_ports, launch_mlflow
from apt_ray.errors import PromptSetError, RegistryError, RegistryUnavailableError
from apt_ray.registry import Registry, open_registry
from tests.registry.registering import make_prompt_set, register


@dataclass
class Switch:
    """An MLflow server that can be away."""

    folder: Path
    port: int
    server: Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def on(self) -> None:
        self.server = launch_mlflow(self.folder, port=self.port)
        self.server.wait_until_ready("/health")

    def off(self) -> None:
        if self.server is not None:
            self.server.terminate()
            self.server.wait_until_ended()
            self.server = None


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Switch]:
    switch = Switch(tmp_path_factory.mktemp("away") / "mlflow", free_ports(1)[0])
    yield switch
    switch.off()


class _Page(BaseHTTPRequestHandler):
    """A web site."""

    def do_GET(self) -> None:
        body = b"<!doctype html><title>Something else</title>" * 50
        self.send_response(200 if self.path == "/health" or self.server.found else 404)  # type: ignore[attr-defined]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize("found", [True, False])
def test_another_server_is_told_from_mlflow(found: bool) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Page) as server:
        server.found = found  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        registry = open_registry(f"http://127.0.0.1:{server.server_port}")
        for ask in (registry.check, registry.aliases, lambda: registry.versions("nut")):
            with pytest.raises(RegistryError, match="does not speak as an MLflow server") as caught:
                ask()
            assert "correct the address" in str(caught.value)
            assert "doctype" not in str(caught.value)
        server.shutdown()


def test_what_could_not_be_registered_waits_and_is_registered_once(
    switch: Switch, tmp_path: Path
) -> None:
    registry = open_registry(switch.url)
    pending = tmp_path / "pending"
    for seed in (0, 1):
        with pytest.raises(RegistryUnavailableError, match="apt-ray registry pending"):
            registry.register(
                make_prompt_set("waiting", seed=seed),
                pictures={"support_images": Image.new("RGB", (8, 8))},
                trials=[{"trial": seed}],
                tags={"ray.job_id": "7"},
                pending=pending,
            )
    assert len(list(pending.iterdir())) == 2
    with pytest.raises(RegistryUnavailableError):
        list(registry.register_pending(pending))
    assert len(list(pending.iterdir())) == 2

    switch.on()
    first = next(registry.register_pending(pending))
    assert (first.version, first.tags["ray.job_id"]) == (1, "7")
    # Killed after the registration, before its folder was removed: it is not registered again.
    assert [one.version for one in registry.register_pending(pending)] in ([1, 2], [2])
    assert list(pending.iterdir()) == []
    assert registry.versions("waiting") == [2, 1]
    loaded, _ = registry.load("waiting", "2")
    assert loaded.settings.seed == 1

    switch.off()
    again = make_prompt_set("waiting", seed=2)
    for _ in range(2):
        with pytest.raises(RegistryUnavailableError):
            registry.register(
                again, pictures={}, trials=[], submission="search/waiting", pending=pending
            )
    assert len(list(pending.iterdir())) == 1
    switch.on()
    resumed = registry.register(again, pictures={}, trials=[], submission="search/waiting")
    assert resumed.version == 3
    assert [one.version for one in registry.register_pending(pending)] == [3]
    assert registry.versions("waiting") == [3, 2, 1]

    (pending / "rubbish").mkdir()
    with pytest.raises(RegistryError, match="rubbish is not a version that waits"):
        list(registry.register_pending(pending))


@pytest.fixture
def registry(mlflow_server: str) -> Registry:
    return open_registry(mlflow_server)


def replace_artifact(mlflow_server: str, run_id: str, data: bytes, folder: Path) -> None:
    path = folder / "prompt_set.safetensors"
    path.write_bytes(data)
    MlflowClient(mlflow_server).log_artifact(run_id, str(path), "version")


def test_a_changed_artifact_is_refused_although_it_can_be_read(
    registry: Registry, mlflow_server: str, tmp_path: Path
) -> None:
    registered = register(registry, make_prompt_set("tampered"))
    other = make_prompt_set("tampered", seed=1)
    replace_artifact(mlflow_server, registered.run_id, other.to_bytes(), tmp_path)
    with pytest.raises(PromptSetError, match="is not the file that was registered"):
        registry.load("tampered")


def test_what_cannot_be_kept_says_so_and_why_it_had_to_be(tmp_path: Path) -> None:
    away = open_registry("http://127.0.0.1:1")
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(RegistryUnavailableError, match=r"no MLflow server .*APT_RAY_PENDING"):
        away.register(make_prompt_set("lost"), pictures={}, trials=[], pending=blocked / "pending")


def test_what_is_not_for_this_category_is_refused(registry: Registry, mlflow_server: str) -> None:
    registered = register(registry, make_prompt_set("theirs"))
    client = MlflowClient(mlflow_server)
    client.create_registered_model("apt-ours")
    client.copy_model_version(f"models:/apt-theirs/{registered.version}", "apt-ours")
    with pytest.raises(PromptSetError, match="holds a prompt set of theirs"):
        registry.load("ours", "1")
