"""cluster.yaml, checked offline against the schema of Ray's cluster launcher."""

import copy
import os
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(CLUSTER.read_text())
    return loaded


def test_ray_accepts_the_file(config: dict[str, Any]) -> None:
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert prepared["available_node_types"]["head"]["max_workers"] == 0


def misspell_a_setting(config: dict[str, Any]) -> None:
    config["idle_timeout_minute"] = config.pop("idle_timeout_minutes")


def misspell_a_setting_of_the_workers(config: dict[str, Any]) -> None:
    worker = config["available_node_types"]["gpu_worker"]
    worker["max_worker"] = worker.pop("max_workers")


def misspell_a_setting_of_docker(config: dict[str, Any]) -> None:
    config["docker"]["run_option"] = config["docker"].pop("run_options")


def ask_for_half_a_gpu(config: dict[str, Any]) -> None:
    config["available_node_types"]["gpu_worker"]["resources"]["GPU"] = 0.5


@pytest.mark.parametrize(
    "spoil",
    [
        misspell_a_setting,
        misspell_a_setting_of_the_workers,
        misspell_a_setting_of_docker,
        ask_for_half_a_gpu,
    ],
)
def test_ray_refuses_a_mistake(
    config: dict[str, Any], spoil: Callable[[dict[str, Any]], None]
) -> None:
    spoil(config)
    with pytest.raises(ValidationError):
        validate_config(prepare_config(config))


def test_head_has_no_gpu_and_spot_workers_scale_from_zero(config: dict[str, Any]) -> None:
    head, worker = (config["available_node_types"][name] for name in ("head", "gpu_worker"))
    assert config["head_node_type"] == "head"
    assert head["resources"]["GPU"] == 0
    assert worker["resources"]["GPU"] >= 1
    assert worker["min_workers"] == 0
    assert 0 < worker["max_workers"] <= config["max_workers"]
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert config["idle_timeout_minutes"] > 0


def test_every_node_asks_for_the_token_that_it_is_given(config: dict[str, Any]) -> None:
    options = config["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    (path,) = (option.partition("=")[2] for option in options if "RAY_AUTH_TOKEN_PATH" in option)
    assert path in config["file_mounts"]


def test_haproxy_is_started_by_the_script_that_keeps_its_ports_closed(
    config: dict[str, Any],
) -> None:
    options = config["docker"]["run_options"]
    assert "--env RAY_SERVE_ENABLE_HA_PROXY=1" in options
    (path,) = (option.partition("=")[2] for option in options if "HAPROXY_BINARY_PATH" in option)
    (inside,) = (place for place, here in config["file_mounts"].items() if here == ".")
    assert os.access(ROOT / Path(path).relative_to(inside), os.X_OK)


def test_ray_serves_as_it_does_on_kubernetes(config: dict[str, Any]) -> None:
    on_kubernetes = yaml.safe_load((ROOT / "serving/kubernetes/base/config.yaml").read_text())
    options = config["docker"]["run_options"]
    here = dict(option.removeprefix("--env ").split("=", 1) for option in options if "=" in option)
    del here["RAY_SERVE_HAPROXY_BINARY_PATH"]  # of the image
    assert {name: value for name, value in here.items() if name.startswith("RAY_SERVE_")} == {
        name: value
        for name, value in on_kubernetes["data"].items()
        if name.startswith("RAY_SERVE_")
    }


def test_nodes_read_from_s3_what_they_do_not_share(config: dict[str, Any]) -> None:
    assert "IamInstanceProfile" in config["available_node_types"]["gpu_worker"]["node_config"]
    assert "--storage s3://" in CLUSTER.read_text()


def test_image_has_the_tested_ray(config: dict[str, Any]) -> None:
    (version,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert config["docker"]["image"].startswith(f"rayproject/ray:{version}-py3")


def test_each_top_level_setting_is_explained() -> None:
    lines = ["", *CLUSTER.read_text().splitlines()]
    settings = [(above, line) for above, line in pairwise(lines) if re.match(r"[a-z_]+:", line)]
    assert len(settings) > 10
    assert [line for above, line in settings if not above.startswith("#")] == []
