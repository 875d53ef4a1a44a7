"""A support bundle holds what helps, and none of the secrets that are anywhere near it."""

import json
import zipfile
from base64 import b64encode
from pathlib import Path
from secrets import token_hex, token_urlsafe

import pytest

from apt_ray.cli.main import main
from apt_ray.doctor import Finding, Setup
from apt_ray.doctor.bundle import write_bundle
from apt_ray.doctor.redaction import Redactor
from apt_ray.errors import DataError, WriteError
from tests.disks import full_disk
from tests.serving.console.fleets import ConsoleFleet, MemoryController, ready, served, tokens

FOUND = [Finding(check="ray", level="error", what="is away", remedy="call it")]


def contents(path: Path) -> dict[str, str]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name).decode() for name in archive.namelist()}


def test_secrets_of_all_kinds_are_planted_and_none_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted: list[str] = []

    def secret(text: str) -> str:
        planted.append(text)
        return text

    home = tmp_path / "home"
    (home / ".aws").mkdir(parents=True)
    (home / ".ray").mkdir()
    (home / ".mlflow").mkdir()
    key, in_file = (
        secret("AKIA" + "Q3EXAMPLE7PLANTD"),
        secret("wJalrXUtnFEMI+K7MDENG/bPxRfiCYPLANTED"),
    )
    (home / ".aws" / "credentials").write_text(
        f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {in_file}\n"
    )
    ray_token = secret(token_hex(32))
    (home / ".ray" / "auth_token").write_text(ray_token + "\n")
    in_mlflow = secret("Tr0ub4dor and three")
    (home / ".mlflow" / "credentials").write_text(
        f"[mlflow]\nmlflow_tracking_password = {in_mlflow}\n"
    )
    password, hook, of_address = secret("correct horse"), secret("whsec-9"), secret("p@ss:w/rd")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    monkeypatch.setenv("APT_RAY_WEBHOOK_SECRET", hook)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:p%40ss%3Aw%2Frd@127.0.0.1:1")
    planted.append("p%40ss%3Aw%2Frd")
    monkeypatch.setenv("AWS_SESSION_TOKEN", secret("FwoGZXIvYXdzEBYaDPLANTED"))
    monkeypatch.setenv("APT_RAY_TOKEN", secret("operator"))
    monkeypatch.setenv(
        "http_proxy", "http://boss:" + secret("sesame-street") + "@proxy.example:3128"
    )
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    foreign, json_web = secret(token_urlsafe(32)), secret("eyJhbGciOi.eyJzdWIiOiJ4.SflKxwRJSM")
    hub, of_url, hexadecimal = (
        secret("hf_" + "aB3" * 9),
        secret("s3cr3t-in-url"),
        secret(token_hex(32)),
    )
    basic = secret(b64encode(f"ann:{password}".encode()).decode())
    pem = secret("MIIEvQIBADANBgkqhkiG9w0BAQEFAASC")
    said, quoted, spaced = secret("hunter2x"), secret("two words here"), secret("swordfish-1")
    lines = [
        "2026-01-01 INFO the replica of washer is ready",
        f"POST /v1/washer/inspect Authorization: Bearer {foreign}",
        f'{{"headers": {{"authorization": "Basic {basic}", "x-request-id": "abc-123"}}}}',
        f"cookie: ray-authentication-token={hexadecimal}; path=/",
        f"connecting to postgresql://mlflow:{of_url}@db.example/mlflow",
        f"jwt {json_web} from hub {hub}",
        f"env: MLFLOW_TRACKING_PASSWORD={password} RAY_AUTH_TOKEN={ray_token}",
        f"https://bucket.example/x?X-Amz-Credential={key}%2Fus&X-Amz-Signature={hexadecimal}&a=1",
        f"password: {said}",
        f'{{"client_secret": "{quoted}", "score": 0.41}}',
        f"mlflow server --password {spaced} --port 5000",
        f"-----BEGIN RSA PRIVATE KEY-----\n{pem}\n-----END RSA PRIVATE KEY-----",
        f"signed with {hook}; looked into {in_file}; said {in_mlflow}; asked {of_address}",
        "2026-01-01 INFO version 7 serves, score 0.2871",
    ]
    logs = tmp_path / "logs"
    (logs / "serve").mkdir(parents=True)
    (logs / "serve" / "replica.log").write_text("\n".join(lines))
    (logs / "core").write_bytes(ray_token.encode())
    digest = secret(token_hex(32))
    fleet_file = tmp_path / "fleet.yaml"
    fleet_file.write_text(
        f"categories: {{washer: {{threshold: 0.41}}}}\nauth:\n  tokens:\n"
        f"    - {{name: line-3, sha256: {digest}, scopes: [inspect]}}\n"
    )

    controller = MemoryController({"washer": ready(problem=f"password={said} was refused")})
    console = ConsoleFleet(None, controller, auth=tokens(operator=["operate"]))  # type: ignore[arg-type]
    bundle = tmp_path / "bundle.zip"
    with served(console) as fleet:
        assert main(
            ["doctor", "--only", "mlflow,fleet,proxy", "--fleet", fleet.url, "--bundle",
             str(bundle), "--fleet-file", str(fleet_file), "--log", str(logs)]
        ) == 1  # fmt: skip
    shown = capsys.readouterr()
    assert "look through them" in shown.err

    parts = contents(bundle)
    everything = bundle.name + "".join(f"{name}\n{text}" for name, text in parts.items())
    assert [text for text in planted if text in everything] == []
    assert not [text for text in (password, of_address, ray_token) if text in shown.out]

    assert set(parts) == {
        *("README.txt", "doctor.json", "system.json", "libraries.txt", "fleet-status.json"),
        *("fleet-file.yaml", "logs/01-replica.log"),
    }
    log = parts["logs/01-replica.log"].splitlines()
    assert (log[0], log[-1]) == (lines[0], lines[-1])
    assert '"score": 0.41' in parts["logs/01-replica.log"]
    assert "@db.example/mlflow" in parts["logs/01-replica.log"]
    assert "abc-123" in parts["logs/01-replica.log"]
    assert json.loads(parts["fleet-status.json"])["categories"]["washer"]["state"] == "READY"
    assert "threshold: 0.41" in parts["fleet-file.yaml"]
    assert "line-3" in parts["fleet-file.yaml"]
    environment = json.loads(parts["system.json"])["environment"]
    assert environment["MLFLOW_TRACKING_USERNAME"] == "ann"
    assert environment["MLFLOW_TRACKING_URI"].endswith("@127.0.0.1:1")
    assert (bundle.stat().st_mode & 0o777) == 0o600


def test_one_secret_is_seen_to_be_one() -> None:
    redact = Redactor(["first-secret", "second-secret"])
    text = redact("a first-secret, a second-secret, a first-secret")
    marks = [part.partition("]")[0] for part in text.split("[redacted ")[1:]]
    assert marks[0] == marks[2] != marks[1]


@pytest.mark.parametrize(
    "text",
    [
        "2026-01-01 12:00:00,000 INFO replica.py:41 - washer: version 7, score 0.2871",
        "/usr/lib/python3.11/site-packages/ray/serve/_private/replica.py",
        "fingerprint f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1, 3 tokens: 12 ms",
        '{"token": null, "needs_token": true}',
        "the fleet does not know the token",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert Redactor()(text) == text


def test_long_logs_are_cut_and_the_newest_come_first(tmp_path: Path) -> None:
    for name, count in (("old.log", 3), ("new.log", 5000)):
        (tmp_path / name).write_text("".join(f"line {number}\n" for number in range(count)))
    path = tmp_path / "bundle.zip"
    names = write_bundle(path, FOUND, Setup(), logs=[tmp_path / "old.log", tmp_path / "new.log"])
    assert names[-2:] == ["logs/01-new.log", "logs/02-old.log"]
    lines = contents(path)["logs/01-new.log"].splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("line 3000", "line 4999", 2000)
    assert json.loads(contents(path)["doctor.json"])[0]["remedy"] == "call it"


def test_what_cannot_be_packed_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bundle.zip"
    with pytest.raises(DataError, match=r"cannot read .*none\.log .*name another"):
        write_bundle(path, FOUND, Setup(), logs=[tmp_path / "none.log"])
    with full_disk(500), pytest.raises(WriteError, match="make room"):
        write_bundle(path, FOUND, Setup())
    # A fleet file that is no YAML may be the very trouble.
    (tmp_path / "fleet.yaml").write_text("auth: [\n  password: hunter2x\n")
    write_bundle(path, FOUND, Setup(), fleet_file=tmp_path / "fleet.yaml")
    assert "auth: [" in contents(path)["fleet-file.yaml"]
    assert "hunter2x" not in contents(path)["fleet-file.yaml"]
    path.unlink()
    assert [file.name for file in tmp_path.iterdir()] == ["fleet.yaml"]
