import base64
import hashlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from ray.serve.schema import ServeDeploySchema

from apt_ray.detection.drift import DriftSettings
from apt_ray.errors import FleetError, RegistryError
from serving import fleet as command
from serving.app import PoolArgs
from serving.controller.orders import Plan
from serving.deploy.cluster import Capacity, Cluster
from serving.deploy.deployment import resolve
from serving.deploy.plan import (
    HttpAddress,
    Pool,
    check_capacity,
    check_exposure,
    pools_of,
    serve_config,
)
from serving.regions import mask_of_png
from serving.settings import CategoryEntry, Fleet
from tests.registry.fake import FakeRegistry
from tests.registry.registering import make_prompt_set

SHIPPED = Path(__file__).resolve().parents[2] / "serving" / "fleet.yaml"
TWO_CPUS = Capacity(cpus=2, gpus=0, node_cpus=2, node_gpus=0, grows=False)
TOKEN = {"name": "line-3", "sha256": hashlib.sha256(b"secret").hexdigest()}


def pools(fleet: Fleet, *names: str) -> list[Pool]:
    entries = fleet.categories if isinstance(fleet.categories, dict) else {}
    return pools_of(fleet, {name: entries.get(name, CategoryEntry()) for name in names})


def config(
    fleet: Fleet, *names: str, gpus: bool = False, tracking_uri: str = "http://127.0.0.1:5000"
) -> ServeDeploySchema:
    return ServeDeploySchema.model_validate(
        serve_config(
            fleet,
            pools(fleet, *names),
            revision=3,
            deployed_by="me@here",
            tracking_uri=tracking_uri,
            address=HttpAddress(host="127.0.0.1", port=8000),
            gpus=gpus,
        )
    )


def plan_of(deployed: ServeDeploySchema) -> Plan:
    (controller,) = [app for app in deployed.applications if app.name == "controller"]
    return Plan.parse(controller.deployments[0].user_config)


def write(folder: Path, text: str) -> Path:
    path = folder / "fleet.yaml"
    path.write_text(text)
    return path


def test_the_shipped_file_shows_every_default(tmp_path: Path) -> None:
    shipped = Fleet.read(SHIPPED)
    assert shipped == Fleet() == Fleet.read(write(tmp_path, ""))
    assert shipped.categories == "all"
    shown = (shipped.defaults, shipped.defaults.autoscaling, shipped.http, shipped.registry)
    for settings in (*shown, shipped.history, DriftSettings(), shipped.auth):
        for name in type(settings).model_fields:
            assert f"  {name}:" in SHIPPED.read_text()
    for name in Fleet.model_fields:
        assert f"\n{name}:" in SHIPPED.read_text()


def test_the_examples_in_the_shipped_file_are_accepted(tmp_path: Path) -> None:
    Image.new("L", (40, 30), "white").save(tmp_path / "pill.png")
    lines = SHIPPED.read_text().splitlines()
    first = lines.index("# categories:")
    last = next(i for i in range(first, len(lines)) if not lines[i].startswith("#"))
    example = "\n".join(line.removeprefix("# ") for line in lines[first:last])
    fleet = Fleet.read(write(tmp_path, f"pools: {{tail: {{}}}}\n{example}"))
    assert isinstance(fleet.categories, dict)
    assert fleet.categories["bottle"].reference == "champion"
    assert fleet.categories["cable"].reference == "candidate"
    assert fleet.categories["screw"].reference == "3"
    assert fleet.categories["hazelnut"].decision.threshold == 0.4
    hazelnut = fleet.own_pool(fleet.categories["hazelnut"]).autoscaling
    assert (hazelnut.min_replicas, hazelnut.max_replicas) == (1, 8)
    assert fleet.pool_of("capsule", fleet.categories["capsule"]) == "tail"
    pill = fleet.categories["pill"].region_of_interest
    assert pill
    assert pill.mask is None
    assert pill.mask_png
    assert mask_of_png(base64.b64decode(pill.mask_png)).all()


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
        ("categories: everything", "categories: Input should be 'all'"),
        ("categories: [nut, bolt]", "categories: Input should be a valid dictionary"),
        ("categories: {nut: {threshold: 0.9}, bolt: {}, nut: {}}", "nut stands there twice"),
        ("pools: {a: {threads: 1, threads: 2}}", "threads stands there twice"),
        ("categories: {4711: {}}", "4711 is no text to YAML: quote it, '4711'"),
        ("categories: {0123: {}}", "quote it, '0123'"),
        ("categories: {no: {}}", "quote it, 'no'"),
        ("categories: {2024-05-01: {}}", "quote it, '2024-05-01'"),
        ("categories: {nut: {alias: 7}}", "categories.nut.alias: .* string: quote it .got 7"),
        ("categories: {nut: {alias: 2024-13-45}}", "cannot read the fleet file"),
        ("pool: 1", "pool: .*quote it"),
        ("auth: {tokens: [{name: 3, sha256: '" + 64 * "0" + "'}]}", "name: .*quote it"),
        ("auth: {tokens: [{name: me, sha256: " + 64 * "1" + "}]}", "sha256: .*quote it"),
        ("http: {timeout_s: .inf}", "http.timeout_s: Input should be a finite number"),
        ("registry: {poll_s: .nan}", "registry.poll_s: Input should be a finite number"),
        ("defaults: {num_cpus: .inf}", "defaults.num_cpus: Input should be a finite number"),
        ("defaults: {num_gpus: 1.5}", "whole number"),
        ("categories: {nut: {pool: tial}}", "no pool 'tial'"),
        ("pool: tial", "no pool 'tial'"),
        (
            "{pools: {t: {}}, categories: {nut: {pool: t, autoscaling: {max_replicas: 2}}}}",
            "under pools",
        ),
        ("{pools: {tail: {}, nut: {}}, categories: {nut: {pool: tail}}}", "rename the pool"),
        ("pools: {tail: {autoscaling: {min_replicas: 9}}}", "tail: min_replicas .9. is more"),
        (
            "categories: {nut: {region_of_interest: {box: [0.5, 0, 0.6, 1]}}}",
            "left, top, width, height",
        ),
        ("categories: {nut: {region_of_interest: {}}}", "a box or a mask"),
        ("categories: {nut: {region_of_interest: {mask: absent.png}}}", "absent.png"),
        ("auth: {tokens: [{name: me, sha256: '" + 64 * "0" + "', scopes: [rule]}]}", "scopes"),
        ("auth: {tokens: [{name: me, sha256: secret}]}", "auth.tokens.0.sha256"),
        ("http: {root_path: fleet/}", "http.root_path"),
        ("http: {allow_origins: ['*']}", "http.allow_origins.0"),
        ("http: {allow_origins: ['https://mes.example/']}", "http.allow_origins.0"),
        ("- all", "fleet file"),
        ("categories: [", "cannot read the fleet file"),
    ],
)
def test_a_bad_file_is_refused_by_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(FleetError, match=says) as caught:
        Fleet.read(path)
    assert str(path) in str(caught.value)


def test_what_is_wrong_is_told_in_the_files_own_words(tmp_path: Path) -> None:
    text = "categories: {'a/b': {}, nut: {threshold: 2, pool: ''}}"
    with pytest.raises(FleetError) as caught:
        Fleet.read(write(tmp_path, text))
    said = str(caught.value)
    assert "categories.a/b: String should match" in said
    assert "categories.nut.threshold: " in said
    for inner in ("literal", "dict[", "function", "[key]"):
        assert inner not in said


def test_a_file_of_another_encoding_is_read_or_named(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_bytes("pool: null\n".encode("utf-8-sig"))
    assert Fleet.read(path) == Fleet()
    path.write_bytes("pool: null\n".encode("utf-16"))
    with pytest.raises(FleetError, match="save it as UTF-8"):
        Fleet.read(path)


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
    deployed = config(fleet, "bolt", "nut")
    apps = {app.route_prefix: app for app in deployed.applications}
    assert set(apps) == {None, "/", "/v1/bolt", "/v1/nut"}
    arguments = PoolArgs.parse(apps["/v1/nut"].args)
    assert (arguments.pool, arguments.shared, arguments.device) == ("nut", False, "cpu")
    (deployment,) = apps["/v1/nut"].deployments
    assert isinstance(deployment.autoscaling_config, dict)
    assert deployment.autoscaling_config["max_replicas"] == 7
    assert deployment.ray_actor_options.num_gpus == 0
    plan = plan_of(deployed)
    assert (plan.revision, plan.deployed_by) == (3, "me@here")
    assert plan.pools["nut"]["nut"].decision.threshold == 0.4


def test_a_long_tail_shares_one_application_and_no_version_is_deployed() -> None:
    names = [f"part-{number}" for number in range(1000)]
    fleet = Fleet.parse({"pools": {"tail": {"max_batch_size": 16}}, "pool": "tail"})
    deployed = config(fleet, *names)
    assert [(app.name, app.route_prefix) for app in deployed.applications] == [
        ("controller", None),
        ("root", "/"),
        ("pool-tail", None),
    ]
    arguments = PoolArgs.parse(deployed.applications[2].args)
    assert (arguments.shared, arguments.batching.max_batch_size) == (True, 16)
    plan = plan_of(deployed)
    assert list(plan.pools) == ["tail"]
    assert set(plan.pools["tail"]) == set(names)
    assert "version" not in json.dumps(plan.to_config())
    # One more category: nothing but the controller's plan differs.
    more = config(fleet, *names, "part-1000")
    differing = [
        old.name
        for old, new in zip(deployed.applications, more.applications, strict=True)
        if old != new
    ]
    assert differing == ["controller"]


def test_the_gpu_fraction_is_asked_for_only_where_there_is_a_gpu() -> None:
    *_, nut = config(Fleet(), "nut", gpus=True).applications
    assert nut.deployments[0].ray_actor_options.num_gpus == 0.25
    assert PoolArgs.parse(nut.args).device == "cuda"


def test_a_password_in_the_registrys_address_stays_out_of_the_configuration() -> None:
    with pytest.raises(FleetError, match="MLFLOW_TRACKING_PASSWORD"):
        config(Fleet(), "nut", tracking_uri="http://me:secret@mlflow:5000")


def test_what_can_never_be_scheduled_is_refused_with_the_numbers() -> None:
    fleet = Fleet.parse({"defaults": {"num_cpus": 1}})
    names = ["a", "b", "c"]
    check_capacity(pools(fleet, *names[:2]), TWO_CPUS)
    with pytest.raises(FleetError, match=r"3 replicas with 3 CPU in all, .* has 2"):
        check_capacity(pools(fleet, *names), TWO_CPUS)
    shared = Fleet.parse({"defaults": {"num_cpus": 1}, "pools": {"tail": {}}, "pool": "tail"})
    check_capacity(pools(shared, *names), TWO_CPUS)
    asleep = Fleet.parse({"defaults": {"num_cpus": 1, "autoscaling": {"min_replicas": 0}}})
    check_capacity(pools(asleep, *names), TWO_CPUS)

    small_nodes = Capacity(cpus=8, gpus=0, node_cpus=1, node_gpus=0, grows=False)
    large = Fleet.parse({"defaults": {"num_cpus": 2}})
    with pytest.raises(FleetError, match="2 CPU on one node, and the largest node has 1"):
        check_capacity(pools(large, "a"), small_nodes)

    one_gpu = Capacity(cpus=8, gpus=1, node_cpus=8, node_gpus=1, grows=False)
    check_capacity(pools(Fleet(), "a", "b", "c", "d"), one_gpu)
    with pytest.raises(FleetError, match=r"5 replicas with 1\.25 GPU in all"):
        check_capacity(pools(Fleet(), "a", "b", "c", "d", "e"), one_gpu)


def test_an_autoscaling_cluster_counts_with_the_nodes_that_it_may_add() -> None:
    asleep = Capacity(cpus=64, gpus=8, node_cpus=2, node_gpus=0, grows=True)
    large = Fleet.parse({"defaults": {"num_cpus": 16, "num_gpus": 1}})
    check_capacity(pools(large, "a", "b", "c", "d"), asleep)


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
    assert command.main(["token", "line-3", "--scope", "inspect:nut", "--scope", "operate"]) == 0
    out, err = capsys.readouterr()
    entry = err.splitlines()[-1]
    (token,) = Fleet.read(write(tmp_path, f"auth:\n  tokens:\n{entry}")).auth.tokens
    assert token.name == "line-3"
    assert token.scopes == ("inspect:nut", "operate")
    assert token.sha256 == hashlib.sha256(out.strip().encode()).hexdigest()
    assert out.strip() not in err


@pytest.mark.parametrize("name", ["3", "no", "a, b: #c", "- x", "Zoë 🏭", 'it\'s "me"', "x" * 99])
def test_the_entry_of_any_name_is_accepted(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert command.main(["token", name]) == 0
    entry = capsys.readouterr().err.splitlines()[-1]
    (token,) = Fleet.read(write(tmp_path, f"auth:\n  tokens:\n{entry}")).auth.tokens
    assert token.name == name


@pytest.mark.parametrize(
    "arguments", [[""], ["two\nlines"], ["me", "--scope", "rule"], ["me", "--scope", "inspect:a/b"]]
)
def test_no_token_is_made_that_the_fleet_file_would_refuse(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["token", *arguments]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")


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


@pytest.mark.parametrize(
    "flag", ["--timeout=nan", "--timeout=inf", "--timeout=-1", "--http-port=0", "--http-port=65536"]
)
def test_deploy_takes_no_numbers_that_mean_nothing(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["deploy", str(SHIPPED), flag])
    assert "must be " in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["status"], ["down"]])
def test_an_absent_cluster_is_reported_at_once(
    arguments: list[str], closed_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"127.0.0.1:{closed_port}"
    assert command.main([*arguments, "--ray-address", address]) == 1
    assert "ray start --head" in capsys.readouterr().err


def test_what_cannot_be_served_is_told_beside_what_can() -> None:
    class Registry(FakeRegistry):
        def aliases(self) -> dict[str, dict[str, int]]:
            return super().aliases() | {"two words": {"champion": 1}}

    registry = Registry()
    for name in ("nut", "bolt"):
        registry.register(make_prompt_set(name), pictures={}, trials=[])
    entries, absent = resolve(Fleet(), registry)
    assert list(entries) == ["bolt", "nut"]
    assert list(absent) == ["two words"]
    named = {"nut": {}, "bolt": {"version": 9}, "washer": {}, "two": {"alias": "spare"}}
    entries, absent = resolve(Fleet.parse({"categories": named}), registry)
    assert set(entries) == set(named)
    assert set(absent) == {"bolt", "washer", "two"}
    assert "no category 'washer'; it has bolt" in absent["washer"]
    registry.is_away = True
    with pytest.raises(RegistryError):
        resolve(Fleet(), registry)


def test_of_two_deploys_at_once_one_is_told(ray_local: None) -> None:
    with Cluster.claimed(7):
        with pytest.raises(FleetError, match="another deploy makes revision 7"), Cluster.claimed(7):
            pass
        with Cluster.claimed(8):
            pass
    with pytest.raises(FleetError, match="another deploy"), Cluster.claimed(7):
        pass  # done is done: whoever comes late looks at what is deployed, and claims the next
    with pytest.raises(KeyError), Cluster.claimed(9):
        raise KeyError
    with Cluster.claimed(9):
        pass  # the first gave up
