"""What people say of inspected images: kept, bounded, told, withdrawn; on a disk and in S3."""

import json
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from apt_ray.data.feedback import Box, Feedback, FeedbackStore
from apt_ray.errors import DataError, FeedbackError, FeedbackQuotaError, WriteError
from apt_ray.files import AnyPath, read_file, s3_client, sizes
from tests.disks import full_disk

DAY_S = 86400.0


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        self.now += 0.001  # no two are said at once
        return self.now


def said(
    request: str, label: str = "false_alarm", by: str = "line-3", **fields: object
) -> Feedback:
    return Feedback.parse(
        {
            "category": "nut",
            "request_id": request,
            "label": label,
            "by": by,
            "width": 40,
            "height": 30,
            "source": "history",
            **fields,
        }
    )


def give(store: FeedbackStore, *args: str, image: bytes = b"image", **fields: object) -> Feedback:
    return store.give(said(*args, **fields), image, "jpg")


@pytest.fixture(params=["disk", "s3"])
def folder(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[AnyPath]:
    """Where feedback lies."""
    if request.param == "disk":
        yield tmp_path / "feedback"
        return
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3_client.cache_clear()
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield "s3://bucket/feedback"
    server.stop()
    s3_client.cache_clear()


def test_an_image_and_what_is_said_of_it_lie_side_by_side(folder: AnyPath) -> None:
    store = FeedbackStore(folder)
    box = Box(x=1, y=2, width=3, height=4)
    given = give(store, "part-7", kind="glare", boxes=[box], note="the new lamp", image=b"pixels")
    assert set(sizes(store.folder / "nut")) == {f"{given.id}.json", f"{given.id}.jpg"}
    assert sizes(store.folder / "nut")[f"{given.id}.jpg"] == len(b"pixels")
    assert read_file(store.path(given)) == b"pixels"
    told = json.loads(read_file(store.folder / "nut" / f"{given.id}.json"))
    assert told["boxes"] == [{"x": 1, "y": 2, "width": 3, "height": 4}]
    assert (told["label"], told["kind"], told["by"]) == ("false_alarm", "glare", "line-3")
    assert told["at"].endswith("+00:00")
    # As much in another process, and nothing of another category.
    again = FeedbackStore(folder)
    assert again.page("nut") == [given]
    assert again.find("nut", given.id) == given
    assert again.page("bolt") == []
    assert again.find("bolt", given.id) is None
    again.withdraw("nut", given.id)
    again.withdraw("nut", given.id)
    assert sizes(store.folder / "nut") == {f"{given.id}.withdrawn": 0}
    assert again.page("nut") == []


def test_the_same_said_again_changes_nothing_and_another_takes_its_place(folder: AnyPath) -> None:
    store = FeedbackStore(folder, clock=Clock())
    first = give(store, "part-7")
    assert give(store, "part-7") == first
    other = give(store, "part-7", by="line-4", label="confirmed_defect")
    changed = give(store, "part-7", label="confirmed_defect")
    assert store.page("nut") == [changed, other]
    assert len(sizes(store.folder / "nut")) == 4


def test_callers_agree_or_not(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path, clock=Clock())
    give(store, "agreed")
    give(store, "agreed", by="line-4", label="confirmed_good")
    give(store, "disputed")
    give(store, "disputed", by="line-4", label="missed_defect")
    disputed, agreed = store.judgements("nut").values()
    assert (agreed.truth, agreed.callers) == ("good", 2)
    assert (disputed.truth, disputed.callers) == (None, 2)


def test_a_page_follows_the_other(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path, clock=Clock())
    given = [
        give(store, str(number), label="false_alarm" if number % 2 else "missed_defect")
        for number in range(5)
    ]
    assert store.page("nut", limit=2) == given[:2:-1]
    assert store.page("nut", limit=2, before=given[3].id) == [given[2], given[1]]
    assert store.page("nut", label="false_alarm") == [given[3], given[1]]


def test_one_caller_cannot_take_all(tmp_path: Path) -> None:
    clock = Clock()
    store = FeedbackStore(tmp_path, images=8, per_day=3, clock=clock)
    for number in range(3):
        give(store, str(number))
    with pytest.raises(FeedbackQuotaError, match="within 24 hours") as refused:
        give(store, "3")
    assert DAY_S - 10 < refused.value.retry_after_s <= DAY_S
    give(store, "2", label="confirmed_defect")  # in the place of what was said
    give(store, "3", by="line-4")
    clock.now += DAY_S
    give(store, "4")
    with pytest.raises(FeedbackQuotaError, match="half of 8"):
        give(store, "5")


def test_what_is_withdrawn_counts_for_its_day(folder: AnyPath) -> None:
    clock = Clock()
    store = FeedbackStore(folder, images=8, per_day=3, clock=clock)
    screw = {"category": "screw"}  # of which no other test says anything

    def withdrawn() -> set[str]:
        found = sizes(store.folder / "screw")
        return {name.removesuffix(".withdrawn") for name in found if name.endswith(".withdrawn")}

    given = [give(store, str(number), **screw).id for number in range(3)]
    for each in given:
        store.withdraw("screw", each)
    assert store.page("screw") == []
    assert withdrawn() == set(given)
    for one in (store, FeedbackStore(folder, images=8, per_day=3, clock=clock)):
        with pytest.raises(FeedbackQuotaError, match="withdrawn or not"):
            give(one, "3", **screw)
    # Of another who draws a sample, and takes it back, nothing counts.
    drawn = give(store, "4", label="sampled", by="line-4", **screw)
    store.withdraw("screw", drawn.id)
    assert withdrawn() == set(given)
    clock.now += DAY_S
    give(store, "3", **screw)
    assert withdrawn() == set()


def test_who_was_refused_is_so_again_without_a_look_at_the_folder(tmp_path: Path) -> None:
    clock = Clock()
    store = FeedbackStore(tmp_path / "kept", images=8, per_day=2, clock=clock)
    store.check("nut", "line-3", ["0"])
    given = [give(store, str(number)) for number in range(2)]
    with pytest.raises(FeedbackQuotaError):
        store.check("nut", "line-3", ["2"])
    # Whoever would look at it now, would fail.
    (tmp_path / "kept").rename(tmp_path / "away")
    (tmp_path / "kept").write_text("no folder")
    with pytest.raises(FeedbackQuotaError, match="within 24 hours") as refused:
        store.check("nut", "line-3", ["3", "3#1"])
    assert DAY_S - 10 < refused.value.retry_after_s <= DAY_S
    for by, request in (("line-4", "3"), ("line-3", "1")):
        with pytest.raises(DataError, match="cannot list"):
            store.check("nut", by, [request])
    clock.now += 61
    with pytest.raises(DataError, match="cannot list"):
        store.check("nut", "line-3", ["3"])
    (tmp_path / "kept").unlink()
    (tmp_path / "away").rename(tmp_path / "kept")
    store.check("nut", "line-3", ["1"])  # in the place of what was said
    store.withdraw("nut", given[1].id)
    with pytest.raises(FeedbackQuotaError):
        store.check("nut", "line-3", ["1"])
    full = FeedbackStore(tmp_path / "kept", mib=1)
    with pytest.raises(FeedbackError, match="may be filled"):
        full.check("nut", "line-4", ["3"], size=2**21)


def test_no_more_is_kept_than_is_allowed(tmp_path: Path) -> None:
    clock = Clock()
    store = FeedbackStore(tmp_path, images=3, mib=1, days=7, clock=clock)
    large = bytes(600_000)
    give(store, "0", image=large)
    with pytest.raises(FeedbackError, match=r"0\.6 MiB"):
        give(store, "1", by="line-4", image=large)
    give(store, "1", by="line-4")
    give(store, "2", by="line-5")
    with pytest.raises(FeedbackError, match="3 images of nut"):
        give(store, "3", by="line-6")
    clock.now += 8 * DAY_S
    assert store.page("nut") == []
    assert sizes(store.folder / "nut") == {}


def test_who_is_killed_leaves_nothing_that_counts(tmp_path: Path) -> None:
    clock = Clock()
    store = FeedbackStore(tmp_path, clock=clock)
    first = give(store, "part-7")
    (tmp_path / "nut" / f"{first.id}.json").rename(tmp_path / "kept.json")
    assert store.page("nut") == []  # an image alone
    assert set(sizes(tmp_path / "nut")) == {f"{first.id}.jpg"}
    clock.now += 3700
    second = give(store, "part-7")
    assert set(sizes(tmp_path / "nut")) == {f"{second.id}.json", f"{second.id}.jpg"}
    # Before it could remove what was said earlier.
    (tmp_path / "kept.json").rename(tmp_path / "nut" / f"{first.id}.json")
    assert store.page("nut") == [second]


def test_what_is_no_feedback_is_left_alone(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path)
    given = give(store, "part-7")
    (tmp_path / "nut" / "README.txt").write_text("labels of line 3")
    (tmp_path / "nut" / f"{given.id}.json").write_text("{}")
    assert store.page("nut") == []
    for name in ("../../etc/passwd", f"../nut/{given.id}", f"{given.id}.json", ""):
        assert store.find("nut", name) is None
        store.withdraw("nut", name)
    assert (tmp_path / "nut" / "README.txt").exists()


def test_a_full_or_closed_disk_is_named(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "kept")
    with full_disk(1000), pytest.raises(WriteError, match="make room"):
        give(store, "part-7", image=bytes(5000))
    assert store.page("nut") == []
    given = give(store, "part-7")
    # What is there and cannot be read is not what was never said.
    spoilt = tmp_path / "kept" / "nut" / f"{given.id}.json"
    spoilt.unlink()
    spoilt.symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match="cannot read"):
        store.find("nut", given.id)
    (tmp_path / "kept" / "bolt").write_text("no folder")
    with pytest.raises(DataError, match="cannot list"):
        store.page("bolt")


def test_files_are_their_owners_alone(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "kept")
    given = give(store, "part-7")
    for path in (tmp_path / "kept" / "nut", tmp_path / "kept" / "nut" / f"{given.id}.jpg"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_sample_is_drawn_as_a_whole(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path, images=5, clock=Clock())
    drawn = [(said(f"part-{number}", label="sampled"), b"image", "jpg") for number in range(3)]
    found = store.draw(drawn)
    assert {each.sample for each in found} == {found[0].sample}
    assert {each.sample_size for each in found} == {3}
    assert [len(entries) for entries in store.samples("nut").values()] == [3]
    assert store.judgements("nut") == {}
    give(store, "part-0", label="confirmed_good")
    assert len(store.page("nut", label="sampled")) == 3
    assert [each.truth for each in store.judgements("nut").values()] == ["good"]
    assert store.drawn("nut", "part-2") == found[2]
    assert store.drawn("nut", "part-9") is None
    with pytest.raises(FeedbackError, match="4 images"):
        store.draw(drawn)
