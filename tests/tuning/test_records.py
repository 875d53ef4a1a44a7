import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from apt_ray.errors import SettingsError
from tests.servers import BUCKET, FaultyS3, make_bucket, rclone, s3_environment
from tuning.calls import RungResult
from tuning.records import SearchPlan, SearchStore, TrialRecord
from tuning.settings import SearchSettings
from tuning.space import Axis

PLAN = SearchPlan(data="x", categories=("washer",), settings=SearchSettings())
WRITTEN_PLAN = """{
  "data": "/data/products",
  "categories": ["washer", "textile"],
  "settings": {
    "shots": 4,
    "support_seeds": [0, 1, 2],
    "trials": 16,
    "live_trials": 8,
    "searcher": "random",
    "scheduler": "asha",
    "objective": "image",
    "steps": 100,
    "time_budget_s": null,
    "seed": 0,
    "promote": "auto",
    "space": {
      "noise_strength": {"low": null, "high": null, "log": false, "choices": [0.1, 0.3]}
    },
    "backbone": {
      "name": "builtin",
      "pretrained": null,
      "quick_gelu": null,
      "input_size": null,
      "tiles": 1,
      "precision": "float32",
      "attention": "locality",
      "locality_radius": 3,
      "locality_blocks": 1,
      "reference_layers": null
    }
  }
}"""
RECORD = TrialRecord(category="washer", number=3, settings={"smgs_weight": 0.5})


def result(**changes: object) -> RungResult:
    values: dict[str, object] = {"state": b"state", "steps": 2, "validation": 0.7, "families": {}}
    return RungResult(**(values | changes))  # type: ignore[arg-type]


def test_a_trial_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    store = SearchStore(str(tmp_path), "search")
    assert store.trial("washer", 3) is None
    assert store.trials("washer") == []
    record = RECORD.reported(result(), 1.5, is_last=False)
    store.save_trial(record, b"state")
    assert store.trial("washer", 3) == record
    assert store.trials("washer") == [record]
    assert store.state(record) == b"state"


def test_only_the_newest_state_of_a_running_trial_is_kept(tmp_path: Path) -> None:
    store = SearchStore(str(tmp_path), "search")
    first = RECORD.reported(result(), 1.0, is_last=False)
    store.save_trial(first, b"first")
    second = first.reported(result(steps=4), 2.0, is_last=False)
    store.save_trial(second, b"second")
    states = tmp_path / "search" / "washer" / "states"
    assert [file.read_bytes() for file in states.iterdir()] == [b"second"]
    store.save_trial(second.reported(result(steps=6), 3.0, is_last=True), b"third")
    assert list(states.iterdir()) == []


def test_a_failed_rung_ends_a_trial_with_its_reason() -> None:
    failed = RECORD.reported(result(error="out of memory"), 1.0, is_last=False)
    assert (failed.status, failed.error, failed.steps) == ("failed", "out of memory", ())


def test_the_plan_of_a_search_is_found_by_its_name(tmp_path: Path) -> None:
    SearchStore(str(tmp_path), "monday").create(PLAN)
    assert SearchStore(str(tmp_path), "monday").plan() == PLAN
    with pytest.raises(SettingsError, match=r"no search tuesday .* only monday"):
        SearchStore(str(tmp_path), "tuesday").plan()


def test_a_plan_on_disk_is_resumed_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "monday").mkdir()
    (tmp_path / "monday" / "search.json").write_text(WRITTEN_PLAN)
    plan = SearchStore(str(tmp_path), "monday").plan()
    assert plan.categories == ("washer", "textile")
    assert plan.settings == SearchSettings(
        trials=16, live_trials=8, space={"noise_strength": Axis(choices=(0.1, 0.3))}
    )


def test_a_search_whose_trials_were_judged_otherwise_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "monday").mkdir()
    older = WRITTEN_PLAN.replace('"image"', '"mean"')
    (tmp_path / "monday" / "search.json").write_text(older)
    with pytest.raises(SettingsError, match=r"another version.*search anew \(.*objective"):
        SearchStore(str(tmp_path), "monday").plan()


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "a b%20c#d?e"
    store = SearchStore(str(folder), "name")
    store.check_writable()
    store.write("found/x", b"x")
    assert SearchStore(str(folder), "name").read("found/x") == b"x"
    assert (folder / "name/found/x").read_bytes() == b"x"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_storage_that_takes_no_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="--storage"):
        SearchStore(str(tmp_path / "file"), "search").create(PLAN)


def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot name a search"):
        SearchStore(str(tmp_path), "../other")


def test_options_of_an_address_stay_behind_the_name() -> None:
    store = SearchStore("s3://bucket/searches?scheme=http", "monday")
    assert store.uri == "s3://bucket/searches/monday?scheme=http"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an S3 server with a bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    environment = s3_environment(address, "key", "secret")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    make_bucket(environment)
    yield address
    server.stop()


def in_s3(address: str, *, bucket: str = BUCKET) -> SearchStore:
    host = address.removeprefix("http://")
    return SearchStore(f"s3://{bucket}/searches?scheme=http&endpoint_override={host}", "monday")


STATE = bytes(range(256)) * 100


def test_a_storage_in_s3_outlives_a_bad_network(bucket: str) -> None:
    with FaultyS3(bucket, slow_downs=2) as server:
        in_s3(server.url).create(PLAN)
        in_s3(server.url).save_trial(RECORD.reported(result(), 1, is_last=False), STATE)
        assert server.faults == 2
    with FaultyS3(bucket, slow_downs=1, breaks=1) as server:
        store = in_s3(server.url)
        assert store.plan() == PLAN
        (record,) = store.trials("washer")
        assert store.state(record) == STATE
        assert server.faults == 2


def test_what_is_written_anew_in_s3_is_read_whole(bucket: str) -> None:
    contents = (b"short", b"long" * 100)
    store, writer = in_s3(bucket), in_s3(bucket)
    store.write("record", contents[0])
    end = threading.Event()

    def write() -> None:
        while not end.is_set():
            for content in contents:
                writer.write("record", content)

    writing = threading.Thread(target=write)
    writing.start()
    try:
        read = [store.read("record") for _ in range(200)]
    finally:
        end.set()
        writing.join()
    assert set(read) <= set(contents)


@pytest.mark.slow
def test_a_storage_in_s3_never_gives_or_keeps_half_a_file(bucket: str) -> None:
    in_s3(bucket).write("state", STATE)
    with FaultyS3(bucket, breaks=999) as server, pytest.raises(OSError, match="partial file"):
        in_s3(server.url).read("state")
    with FaultyS3(bucket, slow_downs=999) as server:
        with pytest.raises(OSError, match="request rate"):
            in_s3(server.url).write("state", b"new")
        with pytest.raises(SettingsError, match=r"cannot write to the storage .*request rate"):
            in_s3(server.url).create(PLAN)
        with pytest.raises(SettingsError, match=r"cannot read the storage .*can be reached"):
            in_s3(server.url).plan()
    assert in_s3(bucket).read("state") == STATE


def test_a_bucket_that_is_missing_is_named(bucket: str) -> None:
    with pytest.raises(SettingsError, match=r"cannot write to the storage s3://nowhere/.*BUCKET"):
        in_s3(bucket, bucket="nowhere").create(PLAN)
    with pytest.raises(SettingsError, match="there is no search monday in s3://nowhere/"):
        in_s3(bucket, bucket="nowhere").plan()


def test_wrong_credentials_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rclone(tmp_path) as environment:
        address = environment["MLFLOW_S3_ENDPOINT_URL"]
        for name, value in s3_environment(address, "key", "wrong").items():
            monkeypatch.setenv(name, value)
        for ask in (lambda store: store.create(PLAN), SearchStore.plan):
            with pytest.raises(SettingsError, match=r"the storage s3://.*(DENIED|SIGNATURE)"):
                ask(in_s3(address))
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", environment["AWS_SECRET_ACCESS_KEY"])
        with pytest.raises(SettingsError, match="there is no search monday"):
            in_s3(address).plan()
