"""Images to learn from, and searches, over HTTP. Ray's jobs are in memory; tests/serving/
test_deployed.py starts real ones."""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from apt_ray.errors import FleetError
from serving.api.searches import Jobs, Searches
from serving.api.training_images import TrainingImages
from serving.api.tuning import Tuning
from serving.settings import Auth
from tests.serving.test_root import LIMITS, ask, root_of, token

IMAGES = "/fleet/categories/washer/images"


@dataclass
class KnownJobs:
    """Ray's jobs, without Ray."""

    jobs: list[Any] = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict)
    is_away: bool = False

    def submit_job(self, *, submission_id: str = "", **job: Any) -> str:
        started = 5000 + 1000 * len(self.jobs)
        known = {"status": "RUNNING", "message": "", "start_time": started, "end_time": None}
        self.jobs.append(SimpleNamespace(submission_id=submission_id, **known, **job))
        return submission_id

    def list_jobs(self) -> list[Any]:
        if self.is_away:
            raise RuntimeError("no answer")
        others = SimpleNamespace(submission_id="theirs", metadata={}, status="RUNNING")
        return [others, *self.jobs]

    def stop_job(self, job_id: str) -> bool:
        self.end(job_id, "STOPPED")
        return True

    def get_job_logs(self, job_id: str) -> str:
        if job_id not in self.logs:
            raise RuntimeError("it lay on a node that is gone")
        return self.logs[job_id]

    def end(self, name: str, status: str, log: str = "", message: str = "") -> None:
        (job,) = (job for job in self.jobs if job.submission_id == name)
        job.status, job.end_time, job.message = status, 9000, message
        self.logs[name] = log


class Fleet:
    """A root, asked as a client asks it."""

    def __init__(self, folder: Path, auth: Auth | None = None) -> None:
        self.jobs, self.folder = KnownJobs(), folder
        tuning = Tuning(
            searches=Searches(
                self._jobs,
                folder,
                tracking_uri="http://registry",
                dashboard="https://ray.example/",
            ),
            images=TrainingImages(folder / "images", limits=LIMITS.image, most=3),
        )
        self._api = root_of(None, auth=auth, tuning=tuning)

    def _jobs(self) -> Jobs:
        if self.jobs.is_away:
            raise FleetError("Ray's dashboard does not take jobs")
        return self.jobs

    def ask(self, method: str, path: str, status: int = 200, **request: Any) -> Any:
        answer = ask(self._api, method, path, **request)
        assert answer.status_code == status, answer.text
        return answer.json() if "json" in answer.headers["content-type"] else answer.content

    def start(self, status: int = 202, **search: object) -> Any:
        return self.ask("POST", "/fleet/searches", status, json={"category": "washer", **search})


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def picture(gray: int, kind: str = "PNG") -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (40, 30), (gray, gray, gray)).save(written, format=kind)
    return written.getvalue()


def test_images_are_kept_once_shown_and_struck_out(fleet: Fleet) -> None:
    assert fleet.ask("GET", IMAGES) == {"images": [], "copies": 0}
    files = [("image", ("a.png", data, "image/png")) for data in (picture(1), picture(2, "BMP"))]
    added = fleet.ask("POST", IMAGES, files=files)
    assert [(one["width"], one["height"]) for one in added["images"]] == [(40, 30)] * 2
    again = fleet.ask("POST", IMAGES, content=picture(1, "TIFF"))  # other bytes, equal pixels
    assert again["copies"] == 1
    first, second = (one["name"] for one in again["images"])
    with Image.open(io.BytesIO(fleet.ask("GET", f"{IMAGES}/{first}"))) as small:
        assert (small.format, small.size) == ("JPEG", (40, 30))
    left = fleet.ask("DELETE", f"{IMAGES}/{first}")
    assert [one["name"] for one in left["images"]] == [second]
    kept = fleet.folder / "images" / "washer" / "good" / second
    assert kept.read_bytes() == picture(2, "BMP")


def test_what_is_no_image_is_not_kept_and_too_many_are_refused(fleet: Fleet) -> None:
    files = [("image", ("x", data, "image/png")) for data in (picture(1), b"junk")]
    assert fleet.ask("POST", IMAGES, 400, files=files)["title"] == "Not an image"
    assert fleet.ask("GET", IMAGES)["images"] == []
    many = [("image", (str(gray), picture(gray), "image/png")) for gray in range(4)]
    problem = fleet.ask("POST", IMAGES, 413, files=many)
    assert "max_images under searches" in problem["remedy"]
    for name in ("absent.png", "..%2F..%2Fsecret"):
        assert fleet.ask("GET", f"{IMAGES}/{name}", 404)["remedy"]
    fleet.ask("POST", "/fleet/categories/.hidden/images", 422, content=picture(1))


def test_a_search_is_a_job_of_the_images_that_were_sent(fleet: Fleet) -> None:
    started = fleet.start(shots=2, trials=3)
    (job,) = fleet.jobs.jobs
    assert job.entrypoint.split()[1:] == [
        *("-m", "tuning.search", "--data", str(fleet.folder / "images")),
        *("--categories", "washer", "--shots", "2", "--trials", "3"),
        *("--progress", str(fleet.folder / "progress" / f"{started['id']}.json")),
        *("--warm-start", "0", "--promote", "never", "--storage", str(fleet.folder / "state")),
    ]
    assert job.runtime_env["env_vars"]["MLFLOW_TRACKING_URI"] == "http://registry"
    assert (started["state"], started["started_at"], started["progress"]) == ("running", 5.0, None)
    assert fleet.start(409)["detail"].startswith(started["id"])
    assert (started["shots"], started["trials"], started["data"]) == (2, 3, None)
    assert started["link"] == f"https://ray.example/#/jobs/{started['id']}"
    (listed,) = fleet.ask("GET", "/fleet/searches")["searches"]
    assert listed == started
    other = fleet.start(category="nut", data="s3://bucket/nut")
    assert other["data"] == "s3://bucket/nut"
    for name, id_ in (("washer", started["id"]), ("nut", other["id"])):
        (listed,) = fleet.ask("GET", f"/fleet/searches?category={name}")["searches"]
        assert listed["id"] == id_
    fleet.ask("GET", "/fleet/searches?category=n.t", 422)


def test_nothing_that_is_sent_reaches_a_shell(fleet: Fleet) -> None:
    fleet.start(data="/data; rm -rf $HOME")
    assert "'/data; rm -rf $HOME'" in fleet.jobs.jobs[0].entrypoint
    fleet.start(422, category="a b")
    fleet.start(422, engine="own")


def test_it_tells_how_far_a_search_is_and_why_it_failed(fleet: Fleet) -> None:
    search = fleet.start()["id"]
    progress = {"trials": 8, "ended": 2, "live": 1, "best": 0.9, "best_sd": 0.1, "left_s": 30.0}
    file = fleet.folder / "progress" / f"{search}.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"categories": {"washer": progress}}))
    assert fleet.ask("GET", f"/fleet/searches/{search}")["progress"] == progress
    fleet.jobs.end(search, "FAILED", "12:00:00  not registered: washer: too dark\nmore", "exit 1")
    failed = fleet.ask("GET", f"/fleet/searches/{search}")
    assert (failed["state"], failed["problem"], failed["ended_at"]) == ("failed", "too dark", 9.0)
    assert failed["log"].endswith("\nmore")
    (listed,) = fleet.ask("GET", "/fleet/searches")["searches"]
    assert (listed["problem"], listed["log"]) == ("too dark", "")


def test_an_estimate_is_told_in_figures(fleet: Fleet) -> None:
    estimate = fleet.start(dry_run=True)
    assert (estimate["dry_run"], estimate["estimate"]) == (True, None)
    assert fleet.jobs.jobs[-1].entrypoint.endswith("--dry-run")
    figures = {"least_s": 60.0, "most_s": 90.0, "cpu_s": 120.0, "gpu_s": 0.0, "encoded_mib": 3.5}
    figures |= {"cpus": 2, "gpus": 0}
    file = fleet.folder / "progress" / f"{estimate['id']}.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"estimate": figures}))
    fleet.jobs.end(estimate["id"], "SUCCEEDED", "by the clock  60 s to 90 s")
    assert fleet.ask("GET", f"/fleet/searches/{estimate['id']}")["estimate"] == figures
    file.write_text("{")  # by another version, or damaged
    assert fleet.ask("GET", f"/fleet/searches/{estimate['id']}")["estimate"] is None
    second = fleet.start(dry_run=True)["id"]
    fleet.jobs.end(second, "FAILED", "nothing of use", "killed")
    assert fleet.ask("GET", f"/fleet/searches/{second}")["problem"] == "killed"


def test_a_search_is_stopped_once(fleet: Fleet) -> None:
    search = fleet.start()["id"]
    for _ in range(2):
        assert fleet.ask("DELETE", f"/fleet/searches/{search}")["state"] == "stopped"
    assert fleet.ask("DELETE", "/fleet/searches/other", 404)["title"] == "Unknown search"


def test_a_dashboard_that_is_away_is_told(fleet: Fleet) -> None:
    fleet.jobs.is_away = True
    assert "dashboard" in fleet.start(503)["detail"]
    assert "dashboard" in fleet.ask("GET", "/fleet/searches", 503)["detail"]


def test_only_operators_tune(tmp_path: Path) -> None:
    auth = Auth.parse({"tokens": [token("line", "inspect"), token("boss", "operate")]})
    fleet = Fleet(tmp_path, auth)
    routes = [
        ("GET", IMAGES),
        ("POST", IMAGES),
        ("GET", f"{IMAGES}/x.png"),
        ("DELETE", f"{IMAGES}/x.png"),
        ("POST", "/fleet/searches"),
        ("GET", "/fleet/searches"),
        ("GET", "/fleet/searches/x"),
        ("DELETE", "/fleet/searches/x"),
    ]
    for method, path in routes:
        fleet.ask(method, path, 401)
        fleet.ask(method, path, 403, headers={"Authorization": "Bearer line"})
    started = fleet.ask(
        "POST",
        "/fleet/searches",
        202,
        json={"category": "washer"},
        headers={"Authorization": "Bearer boss"},
    )
    assert started["by"] == "boss"
    assert fleet.jobs.jobs[0].metadata["by"] == "boss"
