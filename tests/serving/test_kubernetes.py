"""The fleet file as KubeRay takes it, and the manifests around it, checked without a cluster."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from apt_ray.errors import FleetError
from apt_ray.registry import open_registry
from apt_ray.version import __version__
from serving import fleet as command
from serving.controller.orders import Plan
from serving.deploy.kubernetes import ADDRESS, NAME, render
from serving.deploy.plan import Pool, pools_of, serve_config
from serving.settings import CategoryEntry, Fleet
from tests.registry.registering import make_prompt_set, register
from tests.servers import missing
from tests.serving.kuberay import SCHEMAS, unknown_fields

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "serving" / "kubernetes"
OVERLAYS = {"cpu": False, "gpu": True}
MLFLOW = "http://mlflow.mlflow.svc:5000"  # that of the overlays
KUBERNETES = "1.32"
TOKEN = {"name": "line-3", "sha256": "0" * 64}

Manifest = dict[str, Any]


def pools(fleet: Fleet) -> list[Pool]:
    assert isinstance(fleet.categories, dict)
    return pools_of(fleet, fleet.categories)


def rendered(fleet: Fleet, *, gpus: bool = False, tracking_uri: str = MLFLOW) -> Manifest:
    text = render(fleet, pools(fleet), tracking_uri=tracking_uri, gpus=gpus)
    manifest: Manifest = yaml.safe_load(text)
    return manifest


def served(manifest: Manifest) -> Manifest:
    config: Manifest = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    return config


def controller(config: Manifest) -> Manifest:
    (found,) = (each for each in config["applications"] if each["name"] == "controller")
    plan: Manifest = found["deployments"][0]["user_config"]
    return plan


def fleet_of(**settings: Any) -> Fleet:
    return Fleet.parse({"categories": {"nut": {}}, "auth": {"tokens": [TOKEN]}} | settings)


@pytest.mark.parametrize("gpus", [False, True])
def test_what_is_rendered_is_what_a_deploy_makes(gpus: bool) -> None:
    fleet = fleet_of(
        categories={"nut": {"threshold": 0.4}, "bolt": {"pool": "tail"}, "pin": {"pool": "tail"}},
        pools={"tail": {"max_batch_size": 2}},
    )
    config = served(rendered(fleet, gpus=gpus))
    assert ServeDeploySchema.model_validate(config).applications
    plan = controller(config)
    assert config == serve_config(
        fleet,
        pools(fleet),
        revision=plan["revision"],
        deployed_by=plan["deployed_by"],
        tracking_uri=MLFLOW,
        address=ADDRESS,
        gpus=gpus,
    )
    assert Plan.parse(plan).pools["nut"]["nut"] == CategoryEntry(threshold=0.4)


def test_equal_fleets_give_equal_text_and_another_one_another_revision() -> None:
    def text(**settings: Any) -> str:
        fleet = fleet_of(**settings)
        return render(fleet, pools(fleet), tracking_uri=MLFLOW, gpus=False)

    first = text()
    assert text() == first
    revisions = {
        controller(served(yaml.safe_load(each)))["revision"]
        for each in (
            first,
            text(categories={"nut": {"threshold": 0.4}}),
            text(history={"images": 9}),
        )
    }
    assert len(revisions) == 3
    assert min(revisions) > 0


def test_only_what_a_running_server_cannot_change_starts_another_cluster() -> None:
    def cluster(**settings: Any) -> object:
        return rendered(fleet_of(**settings))["spec"]["rayClusterConfig"]

    assert cluster() == cluster(categories={"bolt": {"threshold": 0.4}}, defaults={"threads": 2})
    assert cluster() != cluster(http={"timeout_s": 60})


def test_nobody_is_let_in_without_a_token() -> None:
    with pytest.raises(FleetError, match=r"everyone in reach .* add tokens"):
        rendered(fleet_of(auth={}))


def test_no_secret_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FleetError, match="MLFLOW_TRACKING_PASSWORD"):
        rendered(fleet_of(), tracking_uri="http://me:sesame@mlflow:5000")
    for name in (
        *("RAY_AUTH_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "APT_RAY_WEBHOOK_SECRET"),
        *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    ):
        monkeypatch.setenv(name, "sesame")
    assert "sesame" not in json.dumps(rendered(fleet_of()))


@pytest.fixture
def fleet_file(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.yaml"
    settings = {"categories": {"nut": {}}, "auth": {"tokens": [TOKEN]}}
    path.write_text(json.dumps(settings))
    return path


def test_the_command_asks_neither_cluster_nor_registry_for_named_categories(
    fleet_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://nowhere.example:5000")
    assert command.main(["render", str(fleet_file), "--gpu"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "1 pools ask for 0.25 to 1 CPUs and 0.25 to 1 GPUs of the worker pods\n"
    manifest = yaml.safe_load(shown.out)
    assert manifest == rendered(
        Fleet.read(fleet_file), gpus=True, tracking_uri="http://nowhere.example:5000"
    )


def test_the_command_asks_the_registry_for_all_categories(
    fleet_file: Path, mlflow_server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet_file.write_text(json.dumps({"auth": {"tokens": [TOKEN]}}))
    register(open_registry(mlflow_server), make_prompt_set("hinge"))
    assert command.main(["render", str(fleet_file), "--cpu", "--mlflow", mlflow_server]) == 0
    plan = controller(served(yaml.safe_load(capsys.readouterr().out)))
    assert plan["pools"]["hinge"] == {"hinge": {}}
    assert command.main(["render", str(fleet_file), "--cpu", "--mlflow", "http://127.0.0.1:9"]) == 1
    assert "http://127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--cpu", "--gpu"]])
def test_the_command_asks_for_what_the_pods_have(
    fleet_file: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["render", str(fleet_file), *arguments])
    assert "--cpu" in capsys.readouterr().err


# The manifests.


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def built(overlay: str) -> list[Manifest]:
    """What `kubectl apply -k` of an overlay would send."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        missing("kubectl", "install it, on Debian 13 with `apt-get install kubernetes-client`")
    done = subprocess.run(
        [kubectl, "kustomize", FOLDER / "overlays" / overlay],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no deprecated field
    return list(yaml.safe_load_all(done.stdout))


def named(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = (m for m in manifests if (m["kind"], m["metadata"]["name"]) == (kind, name))
    return found


def clusters(manifests: list[Manifest]) -> dict[str, Manifest]:
    """The specifications of the Ray clusters, of the searches and of the fleet."""
    return {
        "search": named(manifests, "RayCluster", "apt-ray-search")["spec"],
        "fleet": named(manifests, "RayService", NAME)["spec"]["rayClusterConfig"],
    }


def templates(manifests: list[Manifest]) -> Iterator[tuple[str, str, Manifest]]:
    """The cluster, the role and the template of each kind of pod."""
    for cluster, spec in clusters(manifests).items():
        yield cluster, "head", spec["headGroupSpec"]["template"]
        for group in spec["workerGroupSpecs"]:
            yield cluster, "worker", group["template"]


def check(manifest: Manifest) -> None:
    """Raises ValidationError for what Kubernetes, or KubeRay, would not understand."""
    if manifest["kind"] in SCHEMAS:
        jsonschema.validate(manifest, SCHEMAS[manifest["kind"]])
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def check_template(template: Manifest) -> None:
    # Kubernetes' API server takes quantities as numbers, too.
    text = json.loads(json.dumps(template))
    for container in text["spec"]["containers"]:
        limits = container["resources"]["limits"]
        limits.update({name: str(value) for name, value in limits.items()})
    pods = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": text}
    kubernetes_validate.validate(pods, KUBERNETES, strict=True)


def test_the_schemas_accept_the_manifests(built: list[Manifest]) -> None:
    assert {manifest["kind"] for manifest in built} == {
        *("Namespace", "ConfigMap", "NetworkPolicy", "PodDisruptionBudget"),
        *("RayCluster", "RayService"),
    }
    for manifest in built:
        check(manifest)
    for _, _, template in templates(built):
        check_template(template)
    for secret in secrets():
        check(secret)


def test_kuberays_own_definitions_accept_the_manifests(built: list[Manifest]) -> None:
    if "KUBERAY_CRDS" not in os.environ:
        pytest.skip("KUBERAY_CRDS names no folder of KubeRay's definitions")
    found = {}
    for path in Path(os.environ["KUBERAY_CRDS"]).glob("*.yaml"):
        definition = yaml.safe_load(path.read_text())["spec"]
        (version,) = (each for each in definition["versions"] if each["name"] == "v1")
        found[definition["names"]["kind"]] = version["schema"]["openAPIV3Schema"]
    for kind in SCHEMAS:
        (manifest,) = (manifest for manifest in built if manifest["kind"] == kind)
        schema = found[kind]
        jsonschema.Draft4Validator(_plain(schema)).validate(manifest)
        assert list(unknown_fields(manifest["spec"], schema["properties"]["spec"])) == []


def _plain(schema: Any) -> Any:
    """Without OpenAPI's own words, which other schemas do not have."""
    if isinstance(schema, dict):
        if schema.get("x-kubernetes-int-or-string"):
            return {}
        return {name: _plain(value) for name, value in schema.items()}
    return [_plain(item) for item in schema] if isinstance(schema, list) else schema


def misspell(manifests: list[Manifest], kind: str, path: str) -> None:
    *way, last = path.split(".")
    (place, *_) = (manifest for manifest in manifests if manifest["kind"] == kind)
    for step in way:
        place = place[int(step) if step.isdecimal() else step]
    place[f"{last}x"] = place.pop(last)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("RayCluster", "spec.rayVersion"),
        ("RayCluster", "spec.authOptions.secretName"),
        ("RayCluster", "spec.workerGroupSpecs.0.maxReplicas"),
        ("RayService", "spec.serveConfigV2"),
        ("RayService", "spec.rayClusterConfig.headGroupSpec.rayStartParams"),
        ("NetworkPolicy", "spec.policyTypes"),
        ("PodDisruptionBudget", "spec.minAvailable"),
    ],
)
def test_the_schemas_refuse_a_mistake(built: list[Manifest], kind: str, path: str) -> None:
    spoilt = copy.deepcopy(built)
    misspell(spoilt, kind, path)
    (changed, *_) = (m for m in spoilt if m not in built)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(changed)


@pytest.mark.parametrize(
    "path", ["spec.containers.0.envFrom", "spec.securityContext.runAsNonRoot", "spec.volumes"]
)
def test_the_schemas_refuse_a_mistake_in_a_pod(built: list[Manifest], path: str) -> None:
    for _, _, template in templates(built):
        spoilt = {"kind": "x"} | copy.deepcopy(template)
        misspell([spoilt], "x", path)
        del spoilt["kind"]
        with pytest.raises(kubernetes_validate.ValidationError):
            check_template(spoilt)


def test_the_fleet_of_the_overlays_is_rendered_from_the_file(overlay: str) -> None:
    fleet = Fleet.read(FOLDER / "fleet.yaml")
    text = render(fleet, pools(fleet), tracking_uri=MLFLOW, gpus=OVERLAYS[overlay])
    assert (FOLDER / "overlays" / overlay / "fleet.yaml").read_text() == text, (
        f"render it anew, with --{overlay} --mlflow {MLFLOW}, as serving/kubernetes/fleet.yaml says"
    )


def test_the_fleets_part_is_laid_over_its_cluster(built: list[Manifest], overlay: str) -> None:
    service = named(built, "RayService", NAME)
    part = yaml.safe_load((FOLDER / "overlays" / overlay / "fleet.yaml").read_text())
    assert service["spec"]["serveConfigV2"] == part["spec"]["serveConfigV2"]
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]
    assert "apt-ray/http-options" in head["metadata"]["annotations"]
    assert head["metadata"]["labels"] == {"apt-ray/cluster": "fleet", "apt-ray/role": "head"}
    config = served(service)
    for _, role, template in templates([*built]):
        ports = {port["name"]: port["containerPort"] for port in container(template)["ports"]}
        if "serve" in ports:
            assert ports["serve"] == config["http_options"]["port"], role
    assert named(built, "ConfigMap", "apt-ray")["data"]["MLFLOW_TRACKING_URI"] == MLFLOW


def container(template: Manifest) -> Manifest:
    (only,) = template["spec"]["containers"]
    found: Manifest = only
    return found


def test_all_pods_run_one_image_with_the_tested_ray(built: list[Manifest], overlay: str) -> None:
    (version,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {spec["rayVersion"] for spec in clusters(built).values()} == {version}
    images = {container(template)["image"] for _, _, template in templates(built)}
    (image,) = images
    assert image.endswith(f"/apt-ray:{__version__}-{overlay}")


def test_gpus_are_where_the_overlay_has_them(built: list[Manifest], overlay: str) -> None:
    for cluster, role, template in templates(built):
        limits = container(template)["resources"]["limits"]
        wants = overlay == "gpu" and role == "worker"
        assert ("nvidia.com/gpu" in limits) is wants, (cluster, role)
        assert bool(template["spec"].get("tolerations")) is wants, (cluster, role)
    for application in served(named(built, "RayService", NAME))["applications"][2:]:
        asked = application["deployments"][0]["ray_actor_options"]["num_gpus"]
        assert (asked > 0) is (overlay == "gpu")


def test_pods_cannot_harm_their_node(built: list[Manifest]) -> None:
    for cluster, role, template in templates(built):
        pod, place = template["spec"], (cluster, role)
        assert pod["securityContext"]["runAsNonRoot"] is True, place
        assert pod["securityContext"]["runAsUser"] > 0, place
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, place
        # The autoscaler beside the head changes the cluster's size by its own account.
        assert pod.get("automountServiceAccountToken", True) is (role == "head"), place
        autoscaler = clusters(built)[cluster]["autoscalerOptions"]
        for each in (container(template), autoscaler):
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, place
            written = {mount["mountPath"]: mount["name"] for mount in each["volumeMounts"]}
            assert written == {"/tmp": "tmp", "/home/ray": "home"}, place
            assert set(written.values()) == {volume["name"] for volume in pod["volumes"]}, place
    (namespace,) = (manifest for manifest in built if manifest["kind"] == "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_every_pod_is_probed(built: list[Manifest]) -> None:
    for cluster, role, template in templates(built):
        each = container(template)
        agent = {"path": "/api/healthz", "port": 52365}  # asks for no token
        for probe in ("startupProbe", "livenessProbe"):
            assert each[probe]["httpGet"] == agent, (cluster, role, probe)
        serves = (cluster, role) == ("fleet", "worker")
        proxy = {"path": "/-/healthz", "port": "serve"}
        assert each["readinessProbe"]["httpGet"] == (proxy if serves else agent), (cluster, role)


def secrets() -> list[Manifest]:
    return list(yaml.safe_load_all((FOLDER / "secrets.example.yaml").read_text()))


def test_secrets_are_asked_for_by_name_and_none_is_there(built: list[Manifest]) -> None:
    known = {secret["metadata"]["name"]: secret["stringData"] for secret in secrets()}
    assert {value for data in known.values() for value in data.values()} == {"REPLACE-ME"}
    asked = set()
    for _, _, template in templates(built):
        sources = [source.get("secretRef", {}) for source in container(template)["envFrom"]]
        asked |= {source["name"] for source in sources if source}
        # Without its Secret a pod starts: a role may stand in its place.
        assert all(source["optional"] for source in sources if source)
    for spec in clusters(built).values():
        assert spec["authOptions"]["mode"] == "token"
        asked.add(spec["authOptions"]["secretName"])
    assert asked == set(known)
    assert set(known["apt-ray-token"]) == {"auth_token"}
    assert "Secret" not in {manifest["kind"] for manifest in built}


OPERATOR = (
    {"kubernetes.io/metadata.name": "kuberay-system"},
    {"app.kubernetes.io/component": "kuberay-operator"},
)
OURS = "apt-ray"
RAYS_OWN = (6379, 10001, 52365, 30000)


@pytest.mark.parametrize(
    ("namespace", "pod", "fleet", "search"),
    [
        ({}, {}, set(), set()),
        ({"apt-ray/clients": "true"}, {}, {8000}, set()),
        ({"apt-ray/monitoring": "true"}, {}, {8080}, {8080}),
        (*OPERATOR, {8000, 8265}, set()),
        (OPERATOR[0], {}, set(), set()),
        ({}, OPERATOR[1], set(), set()),
        (None, {}, set(), set()),
        (None, {"apt-ray/operator": "true"}, {8265}, {8265}),
        ({}, {"apt-ray/operator": "true"}, set(), set()),
        (None, {"apt-ray/cluster": "fleet"}, {8000, 8080, 8265, *RAYS_OWN}, set()),
        (None, {"apt-ray/cluster": "search"}, set(), {8000, 8080, 8265, *RAYS_OWN}),
        ({}, {"apt-ray/cluster": "fleet"}, set(), set()),
    ],
)
def test_who_reaches_which_port(
    built: list[Manifest],
    namespace: dict[str, str] | None,  # its labels, None for that of apt-ray
    pod: dict[str, str],
    fleet: set[int],
    search: set[int],
) -> None:
    labels = dict(container_labels(built))
    for name, expected in (("fleet", fleet), ("search", search)):
        policy = named(built, "NetworkPolicy", f"apt-ray-{name}")["spec"]
        assert policy["policyTypes"] == ["Ingress"]
        for role_labels in labels[name]:
            assert selects(policy["podSelector"], role_labels)
        reached = {
            port
            for port in (8000, 8080, 8265, *RAYS_OWN)
            for rule in policy["ingress"]
            if "ports" not in rule or port in {each["port"] for each in rule["ports"]}
            if any(comes_from(source, namespace, pod) for source in rule["from"])
        }
        assert reached == expected, name


def container_labels(built: list[Manifest]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    for name in clusters(built):
        yield (
            name,
            [
                template["metadata"]["labels"]
                for cluster, _, template in templates(built)
                if cluster == name
            ],
        )


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


def comes_from(source: Manifest, namespace: dict[str, str] | None, pod: dict[str, str]) -> bool:
    if "namespaceSelector" in source:
        inside = namespace is not None and selects(source["namespaceSelector"], namespace)
    else:
        inside = namespace is None
    return inside and selects(source.get("podSelector", {}), pod)


def test_a_drain_leaves_replicas_and_the_head(built: list[Manifest]) -> None:
    budgets = [m["spec"] for m in built if m["kind"] == "PodDisruptionBudget"]
    pods = [(cluster, role, t["metadata"]["labels"]) for cluster, role, t in templates(built)]
    kept = {
        (cluster, role)
        for cluster, role, labels in pods
        for budget in budgets
        if selects(budget["selector"], labels)
    }
    assert kept == {("fleet", "head"), ("fleet", "worker")}
    assert all(set(budget) == {"minAvailable", "selector"} for budget in budgets)
    (group,) = clusters(built)["fleet"]["workerGroupSpecs"]
    assert group["minReplicas"] > 1  # else no node could ever be drained


def test_the_autoscaled_clusters_have_bounds(built: list[Manifest]) -> None:
    for spec in clusters(built).values():
        assert spec["enableInTreeAutoscaling"] is True
        assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
        for group in spec["workerGroupSpecs"]:
            assert group["minReplicas"] < group["maxReplicas"] <= 4


# The image.


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", "", (FOLDER / "Containerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def test_the_image_is_pinned_unprivileged_and_holds_no_settings() -> None:
    steps = instructions()

    def values(name: str) -> list[str]:
        return [rest for each, rest in steps if each == name]

    (base,) = values("FROM")
    assert re.fullmatch(r"python:3\.1[0-3]-slim-[a-z]+", base)
    assert steps.index(("USER", "1000")) > max(
        index for index, (name, _) in enumerate(steps) if name in ("RUN", "COPY")
    )
    assert "HEALTHCHECK" not in dict(steps)
    (environment,) = values("ENV")
    assert "RAY_SERVE_HAPROXY_BINARY_PATH=/opt/apt-ray/bin/apt-ray-haproxy" in environment
    for copied in values("COPY"):
        *sources, _ = copied.split()
        assert all((ROOT / source).exists() for source in sources)
    install = "/src/serving/kubernetes/install.sh /opt/apt-ray"
    assert any(step.startswith(install) for step in values("RUN"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_image_is_installed_and_starts_what_the_pods_start(tmp_path: Path) -> None:
    """Its steps, in folders of their own: COPY, RUN, ENV."""
    source, installed = tmp_path / "src", tmp_path / "opt"
    source.mkdir()
    for name, rest in instructions():
        if name == "COPY":
            *copied, target = rest.split()
            for each in copied:
                place = tmp_path / target.lstrip("/")
                if (ROOT / each).is_dir():
                    ignored = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / each, place, ignore=ignored)
                else:
                    shutil.copy(ROOT / each, place)
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "RAY_")) and name != "VIRTUAL_ENV"
    }

    def run(*arguments: str | Path, **more: str) -> str:
        done = subprocess.run(
            arguments,
            cwd=tmp_path,
            env=environment | more,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    try:
        run(source / "serving/kubernetes/install.sh", installed, PYTHON=sys.executable)
        shutil.rmtree(source)
        home = {"HOME": str(tmp_path), "PATH": f"{installed}/bin:/usr/bin:/bin"}
        for module in ("serving.fleet", "tuning.search", "apt_ray"):
            assert "usage: " in run("python", "-m", module, "--help", **home)
        assert run("ray", "--version", **home).startswith("ray, version ")
        assert "HAProxy version" in run("apt-ray-haproxy", "-v", **home)
    finally:
        shutil.rmtree(installed, ignore_errors=True)  # gigabytes, which pytest would keep
