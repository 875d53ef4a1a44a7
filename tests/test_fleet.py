import hashlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.serve.schema import ServeDeploySchema

from apt_ray.errors import FleetError
from serving import fleet as command
from serving.app import CategoryArgs, RootArgs
from serving.cluster import Capacity
from serving.deployment import (
    HttpAddress,
    ServedCategory,
    check_capacity,
    check_exposure,
    serve_config,
)
from serving.settings import CategoryEntry, Fleet

SHIPPED = Path(__file__).resolve().parents[1] / "serving" / "fleet.yaml"
TWO_CPUS = Capacity(cpus=2, gpus=0, node_cpus=2, node_gpus=0, grows=False)
TOKEN = {"name": "line-3", "sha256": hashlib.sha256(b"secret").hexdigest()}


def served(fleet: Fleet, *names: str) -> list[ServedCategory]:
    entries = fleet.categories if isinstance(fleet.categories, dict) else {}
    return [
        ServedCategory(name=name, version=3, entry=entries.get(name, CategoryEntry()))
        for name in names
    ]


def config(fleet: Fleet, *names: str, gpus: bool = False) -> ServeDeploySchema:
    return ServeDeploySchema.model_validate(
        serve_config(
            fleet,
            served(fleet, *names),
            tracking_uri="http://127.0.0.1:5000",
            address=HttpAddress(host="127.0.0.1", port=8000),
            gpus=gpus,
        )
    )


def write(folder: Path, text: str) -> Path:
    path = folder / "fleet.yaml"
    path.write_text(text)
    return path


def test_the_shipped_file_shows_every_default(tmp_path: Path) -> None:
    shipped = Fleet.read(SHIPPED)
    assert shipped == Fleet() == Fleet.read(write(tmp_path, ""))
    assert shipped.categories == "all"
    for settings in (shipped.defaults, shipped.defaults.autoscaling, shipped.http, shipped.auth):
        for name in type(settings).model_fields:
            assert f"  {name}:" in SHIPPED.read_text()


def test_the_examples_in_the_shipped_file_are_accepted(tmp_path: Path) -> None:
    lines = SHIPPED.read_text().splitlines()
    first = lines.index("# categories:")
    last = next(i for i in range(first, len(lines)) if not lines[i].startswith("#"))
    example = "\n".join(line.removeprefix("# ") for line in lines[first:last])
    fleet = Fleet.read(write(tmp_path, example))
    assert isinstance(fleet.categories, dict)
    assert fleet.categories["bottle"].reference == "champion"
    assert fleet.categories["cable"].reference == "candidate"
    assert fleet.categories["screw"].reference == "3"
    assert fleet.categories["hazelnut"].decision.threshold == 0.4
    hazelnut = fleet.autoscaling(fleet.categories["hazelnut"])
    assert (hazelnut.min_replicas, hazelnut.max_replicas) == (1, 8)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("categorys: all", "categorys"),
        ("defaults: {num_cpu: 1}", "num_cpu"),
        ("defaults: {autoscaling: {min_replicas: 5}}", "defaults: min_replicas .5. is more than"),
        ("categories: {nut: {autoscaling: {max_replicas: 0}}}", "nut.autoscaling.max_replicas"),
        ("categories: {nut: {autoscaling: {min_replicas: 9}}}", "nut: min_replicas .9. is more"),
        ("categories: {nut: {alias: a, version: 2}}", "an alias or a version, not both"),
        ("categories: {nut: {threshold: 1, false_alarm_rate: 0.1}}", "not both"),
        ("categories: {nut: {threshold: 2}}", "less than or equal to 1"),
        ("categories: {'a/b': {}}", "a/b"),
        ("categories: {}", "names none"),
        ("categories: everything", "'all'"),
        ("defaults: {num_gpus: 1.5}", "whole number"),
        ("auth: {tokens: [{name: me, sha256: secret}]}", "auth.tokens.0.sha256"),
        ("- all", "fleet file"),
        ("categories: [", "cannot read the fleet file"),
    ],
)
def test_a_bad_file_is_refused_by_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(FleetError, match=says) as caught:
        Fleet.read(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match=r"absent\.yaml"):
        Fleet.read(tmp_path / "absent.yaml")


def test_a_category_becomes_an_application_of_its_own() -> None:
    fleet = Fleet.parse(
        {
            "categories": {
                "nut": {"threshold": 0.4, "autoscaling": {"max_replicas": 7}},
                "bolt": None,
            }
        }
    )
    deployed = {app.route_prefix: app for app in config(fleet, "bolt", "nut").applications}
    assert set(deployed) == {"/", "/v1/bolt", "/v1/nut"}
    assert RootArgs.parse(deployed["/"].args).categories == ("bolt", "nut")
    arguments = CategoryArgs.parse(deployed["/v1/nut"].args)
    assert (arguments.category, arguments.version, arguments.device) == ("nut", 3, "cpu")
    assert arguments.decision.threshold == 0.4
    (deployment,) = deployed["/v1/nut"].deployments
    assert isinstance(deployment.autoscaling_config, dict)
    assert deployment.autoscaling_config["max_replicas"] == 7
    assert deployment.ray_actor_options.num_gpus == 0


def test_the_gpu_fraction_is_asked_for_only_where_there_is_a_gpu() -> None:
    *_, nut = config(Fleet(), "nut", gpus=True).applications
    assert nut.deployments[0].ray_actor_options.num_gpus == 0.25
    assert CategoryArgs.parse(nut.args).device == "cuda"


def test_a_password_in_the_registrys_address_stays_out_of_the_configuration() -> None:
    with pytest.raises(FleetError, match="MLFLOW_TRACKING_PASSWORD"):
        serve_config(
            Fleet(),
            served(Fleet(), "nut"),
            tracking_uri="http://me:secret@mlflow:5000",
            address=HttpAddress(host="127.0.0.1", port=8000),
            gpus=False,
        )


def test_what_can_never_be_scheduled_is_refused_with_the_numbers() -> None:
    fleet = Fleet.parse({"defaults": {"num_cpus": 1}})
    names = ["a", "b", "c"]
    check_capacity(fleet, served(fleet, *names[:2]), TWO_CPUS)
    with pytest.raises(FleetError, match=r"3 replicas with 1 CPU each, 3 in all, .* has 2"):
        check_capacity(fleet, served(fleet, *names), TWO_CPUS)

    small_nodes = Capacity(cpus=8, gpus=0, node_cpus=1, node_gpus=0, grows=False)
    large = Fleet.parse({"defaults": {"num_cpus": 2}})
    with pytest.raises(FleetError, match="2 CPU on one node, and the largest node has 1"):
        check_capacity(large, served(large, "a"), small_nodes)

    one_gpu = Capacity(cpus=8, gpus=1, node_cpus=8, node_gpus=1, grows=False)
    check_capacity(Fleet(), served(Fleet(), "a", "b", "c", "d"), one_gpu)
    with pytest.raises(FleetError, match=r"5 replicas with 0\.25 GPU each, 1\.25 in all"):
        check_capacity(Fleet(), served(Fleet(), "a", "b", "c", "d", "e"), one_gpu)


def test_an_autoscaling_cluster_counts_with_the_nodes_that_it_may_add() -> None:
    asleep = Capacity(cpus=64, gpus=8, node_cpus=2, node_gpus=0, grows=True)
    large = Fleet.parse({"defaults": {"num_cpus": 16, "num_gpus": 1}})
    check_capacity(large, served(large, "a", "b", "c", "d"), asleep)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_without_tokens_only_this_machine_can_ask(host: str) -> None:
    check_exposure(Fleet(), HttpAddress(host=host, port=8000))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "factory.example"])
def test_other_machines_can_ask_only_with_tokens(host: str) -> None:
    address = HttpAddress(host=host, port=8000)
    with pytest.raises(FleetError, match="add tokens to the fleet file"):
        check_exposure(Fleet(), address)
    check_exposure(Fleet.parse({"auth": {"tokens": [TOKEN]}}), address)


def test_a_token_is_shown_once_and_its_entry_is_accepted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert command.main(["token", "line-3"]) == 0
    out, err = capsys.readouterr()
    entry = err.splitlines()[-1]
    (token,) = Fleet.read(write(tmp_path, f"auth:\n  tokens:\n{entry}")).auth.tokens
    assert token.name == "line-3"
    assert token.sha256 == hashlib.sha256(out.strip().encode()).hexdigest()
    assert out.strip() not in err


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is taken but does not listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.parametrize("option", ["--mlflow", "--host"])
def test_deploy_says_what_it_cannot_do_without_touching_a_cluster(
    option: str, closed_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    value = {"--mlflow": f"http://127.0.0.1:{closed_port}", "--host": "0.0.0.0"}[option]
    assert command.main(["deploy", str(SHIPPED), option, value]) == 1
    expected = {"--mlflow": "start one with `mlflow server`", "--host": "serving.fleet token"}
    assert expected[option] in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["status"], ["down"]])
def test_an_absent_cluster_is_reported_at_once(
    arguments: list[str], closed_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"127.0.0.1:{closed_port}"
    assert command.main([*arguments, "--ray-address", address]) == 1
    assert "ray start --head" in capsys.readouterr().err
