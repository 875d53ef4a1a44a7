"""The registry on sqlite, and on PostgreSQL with its artifacts in S3."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from apt_ray.devtools.local_stack import free_ports, launch_mlflow
from apt_ray.errors import RegistryError
from apt_ray.registry import open_registry
from tests.registry.registering import make_prompt_set, register
from tests.servers import BUCKET, moto, postgres, rclone, stored

PARALLEL = 16


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with postgres() as address:
        yield address


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with moto(tmp_path_factory.mktemp("moto")) as environment:
        yield environment


@pytest.fixture(scope="module")
def large_server(
    database: str, s3: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of an MLflow server as many machines share it."""
    with launch_mlflow(
        tmp_path_factory.mktemp("large") / "mlflow",
        port=free_ports(1)[0],
        database=database,
        artifacts=f"s3://{BUCKET}/registry",
        environment=s3,
    ) as server:
        server.wait_until_ready("/health")
        yield server.url


@pytest.mark.parametrize("servers", ["mlflow_server", "large_server"])
def test_parallel_registrations_lose_nothing(servers: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(servers)
    prompt_sets = [make_prompt_set("crowd", seed=seed) for seed in range(PARALLEL)]
    with ThreadPoolExecutor(PARALLEL) as pool:
        registered = list(pool.map(lambda one: register(open_registry(url), one), prompt_sets))
    assert sorted(one.version for one in registered) == list(range(1, PARALLEL + 1))
    registry = open_registry(url)
    for one, prompt_set in zip(registered, prompt_sets, strict=True):
        loaded, _ = registry.load("crowd", str(one.version))
        assert loaded.to_bytes() == prompt_set.to_bytes()
    history = registry.history("crowd")
    assert history.candidate == PARALLEL
    assert [move.target for move in history.moves] == [history.champion]


def test_artifacts_lie_in_s3(large_server: str, s3: dict[str, str]) -> None:
    registered = register(open_registry(large_server), make_prompt_set("stored"))
    files = [key for key in stored(s3) if registered.run_id in key]
    assert [key for key in files if key.startswith("registry/")] == files
    assert any(key.endswith("version/prompt_set.safetensors") for key in files)


def test_wrong_credentials_of_the_store_leave_no_half_version(tmp_path: Path) -> None:
    with rclone(tmp_path) as right:
        assert stored(right) == []  # the right ones open it
        wrong = {**right, "AWS_SECRET_ACCESS_KEY": "guessed"}
        with launch_mlflow(
            tmp_path / "mlflow",
            port=free_ports(1)[0],
            artifacts=f"s3://{BUCKET}/registry",
            environment=wrong,
        ) as server:
            server.wait_until_ready("/health")
            registry = open_registry(server.url)
            with pytest.raises(RegistryError, match="refused"):
                register(registry, make_prompt_set("locked"))
            assert registry.versions("locked") == []
            assert "locked" not in registry.champions()
        assert "guessed" not in server.log.read_text()
