"""What the tests share: real servers, started once a session and only where used, and images."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from apt_ray.anomalies.bank import SupportBank, encode_support
from apt_ray.config import BackboneSpec, FitSettings
from apt_ray.data.folders import Category, find_categories
from apt_ray.data.samples.factory import write_samples
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.devtools.local_stack import free_ports, launch_mlflow
from apt_ray.features.clip import FrozenCLIP
from apt_ray.images import read_image
from apt_ray.prompts.fit import fit
from apt_ray.validation.judge import Judge, encode_judge
from tests.backbones import shared_backbone
from tests.fakes import bank_spec, judge_spec

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that read the built-in backbone, so that a quick run can pass them over.

    Files whose tests may take longest come first, or a worker would begin with one when the others
    are done.
    """
    longest: dict[Path, float] = {}
    for item in items:
        if "backbone" in getattr(item, "fixturenames", ()):
            item.add_marker("backbone")
        if (limit := item.get_closest_marker("timeout")) and not item.get_closest_marker("slow"):
            longest[item.path] = max(limit.args[0], longest.get(item.path, 0))
    items.sort(key=lambda item: -longest.get(item.path, 0))


@pytest.fixture(scope="session", autouse=True)
def _no_foreign_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests away from the servers and the files of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("RAY_ADDRESS", "RAY_API_SERVER", "RAY_AUTH", "MLFLOW_")):
                patch.delenv(name)
        patch.setenv("APT_RAY_PENDING", str(tmp_path_factory.mktemp("pending")))
        yield


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real MLflow server with an empty registry."""
    folder = tmp_path_factory.mktemp("mlflow") / "mlflow"
    with launch_mlflow(folder, port=free_ports(1)[0]) as server:
        server.wait_until_ready("/health")
        yield server.url


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A Ray of this session's own, with 4 CPUs, in which the tests are the driver."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the procedural sample categories."""
    root = tmp_path_factory.mktemp("samples")
    write_samples(root)
    return root


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images; skips where there is none, and fails where CI demands it."""
    root = Path(os.environ.get("APT_RAY_DATA") or ROOT.parent / "shared" / "data")
    if root.is_dir():
        return root
    reason = f"no real images in {root}: set APT_RAY_DATA to a folder of categories"
    if os.environ.get("CI_REQUIRE_DATA"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def backbone() -> FrozenCLIP:
    """The built-in backbone."""
    return shared_backbone(BackboneSpec(), device="cpu")


@pytest.fixture(scope="session")
def category(sample_data: Path) -> Category:
    """One sample category."""
    return find_categories(sample_data)[0]


@pytest.fixture(scope="session")
def bank(backbone: FrozenCLIP, category: Category) -> SupportBank:
    """Its first three support images, encoded at two noise strengths."""
    images = [read_image(path) for path in category.support_set(3, seed=0)]
    return encode_support(backbone, images, bank_spec(backbone, 3, strengths=(0.1, 0.3)))


@pytest.fixture(scope="session")
def judge(backbone: FrozenCLIP, category: Category) -> Judge:
    """What judges the trials that learn from that bank."""
    images = [read_image(path) for path in category.support_set(3, seed=0)]
    return encode_judge(backbone, images, judge_spec(backbone, 3))


@pytest.fixture(scope="session")
def prompt_set(backbone: FrozenCLIP, category: Category, bank: SupportBank) -> PromptSet:
    """A prompt set of that category, after a few steps."""
    return fit(
        category.name,
        category.support_set(3, seed=0),
        FitSettings(steps=10),
        backbone=backbone,
        bank=bank,
    )
