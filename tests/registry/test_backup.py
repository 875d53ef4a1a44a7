"""A registry that is lost comes back from its file, or the file is refused."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from apt_ray.cli.main import main
from apt_ray.config import OperatorThreshold
from apt_ray.data.folders import Category
from apt_ray.errors import RegistryError, RegistryUnavailableError, WriteError
from apt_ray.registry import (
    CANDIDATE,
    CHAMPION,
    ExportedVersion,
    RegisteredVersion,
    Registry,
    export_registry,
    import_registry,
    open_registry,
    roll_back,
)
from tests.disks import full_disk
from tests.registry.fake import FakeRegistry
from tests.registry.registering import make_prompt_set

SAID = OperatorThreshold(value=0.41, reason="dust, süß", by="shift-2", at="2025-01-01T00:00:00")


def fill(registry: Registry, *categories: str, held_out: Category | None = None) -> None:
    """Versions 3 and 5 of each, of which 3 serves again after 5 did."""
    files = held_out.good if held_out else ()
    for name in categories:
        for seed in range(5):
            registry.register(
                make_prompt_set(name, seed=seed),
                pictures={"trials": Image.new("RGB", (8, 8), (seed, 0, 0))},
                trials=[{"trial": seed, "score": 0.5}],
                support=files[:3],
                held_out=files[3:6],
                tags={"git_commit": "ab" * 20},
            )
        for target in (3, 5):
            registry.move(registry.history(name), target, action="promote", why=f"better, {target}")
        roll_back(registry, name, why="too strict")
        registry.annotate(
            registry.resolve(name, "5"), {"verdict": "kept"}, report="### kept", name="one"
        )
        registry.set_threshold(name, SAID)
        for number in (1, 2, 4):
            registry.delete(name, number)


def state(registry: Registry, category: str, folder: Path) -> dict[str, object]:
    """All that can be seen of a category, but when it was registered and by which run."""
    known = registry.categories()[category]
    told: dict[str, object] = {
        "aliases": dict(known.aliases),
        "threshold": known.threshold,
        "moves": registry.history(category).moves,
    }
    for number in registry.versions(category):
        version = registry.resolve(category, str(number))
        home = folder / f"{category}-{number}"
        home.mkdir(parents=True)
        registry.export(version, home)
        told[f"version {number}"] = (
            registry.fetch(version),
            {key: tag for key, tag in version.tags.items() if key != "restored_as"},
            dict(version.settings),
            dict(version.metrics),
            sorted(version.aliases),
            {p.relative_to(home): p.read_bytes() for p in home.rglob("*") if p.is_file()},
        )
    return told


def test_from_one_server_to_another_all_is_the_same(
    mlflow_server: str, tmp_path: Path, category: Category, capsys: pytest.CaptureFixture[str]
) -> None:
    """From memory into MLflow and back, so that neither hides what the other forgets."""
    lost, registry, again = FakeRegistry(), open_registry(mlflow_server), FakeRegistry()
    fill(lost, "backed", held_out=category)
    before = state(lost, "backed", tmp_path / "before")
    assert set(before) >= {"version 3", "version 5"}
    export_registry(lost, tmp_path / "first.tar")

    arguments = ["registry", "import", str(tmp_path / "first.tar"), "--mlflow", mlflow_server]
    assert main([*arguments, "--dry-run"]) == 0
    assert "backed" not in registry.aliases()
    for _ in range(2):  # once more changes nothing
        capsys.readouterr()
        assert main(arguments) == 0
        assert capsys.readouterr().out == "backed: 2 versions, 3 to 5\n"
        assert registry.aliases()["backed"] == {CHAMPION: 3, CANDIDATE: 5}
    assert state(registry, "backed", tmp_path / "mlflow") == before

    # What is read in MLflow comes along, too.
    client = MlflowClient(mlflow_server)
    report = "### A second look"
    registry.annotate(registry.resolve("backed", "5"), {}, report=report, name="two")
    old = client.get_model_version("apt-backed", "5")
    out = tmp_path / "second.tar"
    arguments = ["registry", "export", "backed", "--out", str(out), "--mlflow", mlflow_server]
    assert main(arguments) == 0
    assert (out.stat().st_mode & 0o777) == 0o600
    client.delete_registered_model("apt-backed")
    import_registry(registry, out)
    new = client.get_model_version("apt-backed", "5")
    assert new.run_id != old.run_id
    assert report in new.description
    assert new.description == old.description.replace(old.run_id, new.run_id)
    assert [f.path for f in client.list_artifacts(new.run_id, "reports")] == ["reports/two.md"]
    assert "too strict" in client.get_registered_model("apt-backed").description

    import_registry(again, tmp_path / "second.tar")
    after = state(again, "backed", tmp_path / "again")
    after["version 5"] = before["version 5"]  # which has a report by now
    assert after == before
    # The next version has the next number.
    assert registry.register(make_prompt_set("backed"), pictures={}, trials=[]).version == 6


class Breaking(FakeRegistry):
    """Goes away after some versions were restored, before or after the last was kept."""

    left, keeps_last = 99, True

    def restore(self, folder: Path, exported: ExportedVersion) -> RegisteredVersion:
        self.left -= 1
        if self.left < 0 and not self.keeps_last:
            raise RegistryUnavailableError("gone: call it back")
        restored = super().restore(folder, exported)
        if self.left < 0:
            raise RegistryUnavailableError("gone: call it back")
        return restored


@pytest.mark.parametrize("keeps_last", [True, False])
@pytest.mark.parametrize("survived", range(6))
def test_an_import_that_is_cut_off_anywhere_is_begun_again(
    survived: int, keeps_last: bool, tmp_path: Path
) -> None:
    lost, registry = FakeRegistry(), Breaking()
    fill(lost, "nut")
    export_registry(lost, tmp_path / "nut.tar")
    registry.left, registry.keeps_last = survived, keeps_last
    try:
        import_registry(registry, tmp_path / "nut.tar")
    except RegistryUnavailableError:
        assert CHAMPION not in registry.aliases().get("nut", {}), (
            "nothing serves before all is there"
        )
    registry.left = 99
    import_registry(registry, tmp_path / "nut.tar")
    assert state(registry, "nut", tmp_path / "a") == state(lost, "nut", tmp_path / "b")


def test_a_registry_with_something_else_stays_as_it_is(tmp_path: Path) -> None:
    lost = FakeRegistry()
    fill(lost, "bolt", "nut")
    path = tmp_path / "all.tar"
    export_registry(lost, path)

    other = FakeRegistry()
    other.register(make_prompt_set("nut", seed=99), pictures={}, trials=[])
    with pytest.raises(RegistryError, match=r"nut .* version 1 is another .* nothing was changed"):
        import_registry(other, path)
    assert other.aliases() == {"nut": {CHAMPION: 1, CANDIDATE: 1}}

    moved = FakeRegistry()
    import_registry(moved, path)
    moved.move(moved.history("nut"), 5, action="promote", why="newest")
    with pytest.raises(RegistryError, match=r"nut .*moved since .* import into an empty registry"):
        import_registry(moved, path)
    assert moved.champions()["nut"] == 5
    by_hand = FakeRegistry()
    import_registry(by_hand, path)
    by_hand.set_alias("nut", CHAMPION, 5)
    with pytest.raises(RegistryError, match=r"moved since"):
        import_registry(by_hand, path)

    used = FakeRegistry()
    for seed in range(4):
        used.register(make_prompt_set("nut", seed=seed), pictures={}, trials=[], promote=False)
    for number in (1, 2, 3, 4):
        used.delete("nut", number)
    with pytest.raises(RegistryError, match=r"given the number 3 of nut to another .*empty one"):
        import_registry(used, path)
    # Other categories are nobody's business.
    beside = FakeRegistry()
    beside.register(make_prompt_set("gear"), pictures={}, trials=[])
    import_registry(beside, path)
    assert beside.champions() == {"gear": 1, "bolt": 3, "nut": 3}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    lost = FakeRegistry()
    lost.register(make_prompt_set("nut"), pictures={}, trials=[])
    export_registry(lost, tmp_path / "nut.tar")
    return tmp_path / "nut.tar"


def rewritten(path: Path, **changes: object) -> Path:
    """The same with another manifest, or further members."""
    other = path.with_name("other.tar")
    with tarfile.open(path) as old, tarfile.open(other, "w") as new:
        for member in old:
            data = old.extractfile(member).read()  # type: ignore[union-attr]
            if member.name == "manifest.json":
                told = json.loads(data)
                for name, text in changes.items():
                    if name in told:
                        told[name] = text
                        continue
                    extra = tarfile.TarInfo(name)
                    content = str(text).encode()
                    extra.size = len(content)
                    new.addfile(extra, io.BytesIO(content))
                data = json.dumps(told).encode()
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    return other


def test_no_file_that_is_not_whole_is_taken_for_one(written: Path) -> None:
    data = written.read_bytes()
    registry = FakeRegistry()
    cut = written.with_name("cut.tar")
    for size in (0, 1, 511, 512, 5000, len(data) // 2, len(data) - 11_000):
        cut.write_bytes(data[:size])
        with pytest.raises(RegistryError, match=r"is no whole backup .* another backup"):
            import_registry(registry, cut)
    for place in (data.index(b"prompt_set.safetensors") + 1100, data.index(b'"aliases"') + 30):
        damaged = bytearray(data)
        damaged[place] ^= 4
        cut.write_bytes(damaged)
        with pytest.raises(RegistryError, match=r"nut\.|no whole backup|cut\.tar"):
            import_registry(registry, cut)
    with pytest.raises(RegistryError, match=r"no whole backup .*No such file"):
        import_registry(registry, written.with_name("none.tar"))
    with pytest.raises(RegistryError, match="later apt-ray"):
        import_registry(registry, rewritten(written, format=2))
    with pytest.raises(RegistryError, match=r"stranger.* has been changed, or is missing"):
        import_registry(registry, rewritten(written, stranger="x"))
    assert registry.aliases() == {}


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/../../outside"])
def test_no_file_leads_outside(written: Path, name: str) -> None:
    with tarfile.open(written) as archive:
        told = json.loads(archive.extractfile("manifest.json").read())  # type: ignore[union-attr]
    told["categories"]["nut"]["versions"]["1"]["files"][name] = "00" * 32
    with pytest.raises(RegistryError, match="cannot name a file of a version"):
        import_registry(FakeRegistry(), rewritten(written, categories=told["categories"]))
    told["categories"] = {name: told["categories"]["nut"]}
    with pytest.raises(RegistryError, match="cannot name a category"):
        import_registry(FakeRegistry(), rewritten(written, categories=told["categories"]))


def test_an_export_that_fails_leaves_the_one_before(written: Path) -> None:
    before = written.read_bytes()
    lost = FakeRegistry()
    fill(lost, "nut")
    with full_disk(20_000), pytest.raises(WriteError, match="make room"):
        export_registry(lost, written)
    with pytest.raises(RegistryError, match="no category 'absent'"):
        export_registry(lost, written, ["absent"])
    assert written.read_bytes() == before
    assert [file.name for file in written.parent.iterdir()] == [written.name]
