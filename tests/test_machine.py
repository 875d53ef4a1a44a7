"""A uid without a name and a home, as containers have it; in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from apt_ray.devtools.local_stack import command_environment
from apt_ray.registry import open_registry
from tests.registry.registering import make_prompt_set

_NAMELESS = """
import os, pwd

def no_entry(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = no_entry
for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
    os.environ.pop(name, None)
os.environ.pop("APT_RAY_PENDING", None)
"""


def run(code: str) -> list[str]:
    """What Python prints to whom the system denies name and home."""
    done = subprocess.run(
        [sys.executable, "-c", _NAMELESS + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_uid_without_a_name_has_a_name_and_no_home_that_is_anybodys() -> None:
    lines = run(
        """
from pathlib import Path
from apt_ray.anomalies.cache import default_cache_folder
from apt_ray.files import absolute
from apt_ray.machine import expanded, who
from apt_ray.registry import default_pending
from serving.controller.cache import Cache

print(who())
for path in (default_cache_folder(), default_pending(), absolute(Path("~/x")), expanded(Path("y"))):
    print(path)
assert Cache("~/.cache/apt-ray/fleet", "registry").get("nut", 1) is None
"""
    )
    assert lines[0].startswith(f"uid-{os.getuid()}@")
    assert lines[1:] == [
        "/nonexistent/.cache/apt-ray/banks",
        "/nonexistent/.local/state/apt-ray/pending",
        "/nonexistent/x",
        "y",
    ]


@pytest.mark.parametrize("program", ["apt_ray.cli.main", "serving.fleet", "tuning.search"])
def test_a_uid_without_a_name_reaches_the_registry(program: str, mlflow_server: str) -> None:
    open_registry(mlflow_server).register(make_prompt_set("nameless"), pictures={}, trials=[])
    arguments, said = {
        "apt_ray.cli.main": (["registry", "history", "nameless"], "first"),
        "serving.fleet": (["history", "nameless"], "first"),
        "tuning.search": (
            ["--register-pending"],
            "0 versions registered; none waits in /nonexistent/.local/state/apt-ray/pending",
        ),
    }[program]
    lines = run(
        f"""
from {program} import main
assert main({[*arguments, "--mlflow", mlflow_server]!r}) == 0
"""
    )
    assert said in lines[-1]


@pytest.mark.parametrize("given", [{}, {"no_proxy": "factory"}, {"NO_PROXY": "*"}])
def test_commands_reach_this_machine_past_a_proxy(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch, mlflow_server: str, tmp_path: Path
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    for name, value in ({"http_proxy": "http://127.0.0.1:9"} | given).items():
        monkeypatch.setenv(name, value)
    code = f"import requests; print(requests.get('{mlflow_server}/health').text)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=command_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "OK\n"
