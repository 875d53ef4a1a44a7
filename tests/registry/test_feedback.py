"""What people say becomes a version: chosen, held against confirmed defects, promoted."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apt_ray.config import FitSettings
from apt_ray.data.feedback import Feedback, FeedbackStore
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import GateError, RegistryError
from apt_ray.images import decode_image
from apt_ray.prompts.fit import fit
from apt_ray.registry import CANDIDATE, CHAMPION, promote, roll_back
from apt_ray.registry.feedback import (
    MOST_DEFECTS,
    accept_feedback,
    calibrate_by_samples,
    confirmed_defects,
)
from tests.fakes import FakeBackbone
from tests.registry.fake import FakeRegistry

GLARE, SCRATCH = (0, 0, 255), (255, 0, 0)
BACKBONE = FakeBackbone()


def part(spot: tuple[int, int, int] | None = None, *, seed: int = 0) -> bytes:
    """A gray part with a spot."""
    g = np.random.default_rng(seed)
    pixels_HWC = np.full((32, 32, 3), 128) + g.integers(-4, 5, (32, 32, 3))
    if spot is not None:
        pixels_HWC[8:16, 8:16] = np.array(spot) + g.integers(-4, 5, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


class Line:
    """A line with a champion that looks at the memory alone, and people who say what they saw."""

    def __init__(self, folder: Path) -> None:
        support = []
        for seed in range(3):
            support.append(folder / f"{seed}.png")
            support[-1].write_bytes(part(seed=seed))
        settings = FitSettings(steps=1, reference_copies=1, reference_weight=1.0)
        fitted = fit("nut", support, settings, backbone=BACKBONE)
        self.champion = fitted.with_threshold(fitted.threshold.moved_to(0.05))
        self.registry = FakeRegistry()
        self.registry.register(self.champion, pictures={}, trials=[], support=support)
        self.store = FeedbackStore(folder / "feedback")

    def score(self, image: bytes) -> float:
        (found,) = Detector(BACKBONE, self.champion).inspect([decode_image(image)])
        return found.anomaly_score

    def feedback(self, request: str, label: str, image: bytes, by: str = "line-3") -> Feedback:
        return Feedback.parse(
            {
                "category": "nut",
                "request_id": request,
                "label": label,
                "by": by,
                "width": 32,
                "height": 32,
                "source": "history",
                "version": 1,
                "score": self.score(image),
                "threshold": 0.05,
            }
        )

    def say(self, request: str, label: str, image: bytes, by: str = "line-3") -> Feedback:
        return self.store.give(self.feedback(request, label, image, by), image, "png")

    def draw(self, count: int) -> list[Feedback]:
        drawn = [
            (self.feedback(f"drawn-{seed}", "sampled", part(seed=seed)), part(seed=seed), "png")
            for seed in range(100, 100 + count)
        ]
        return self.store.draw(drawn)

    def judge(self, drawn: list[Feedback], label: str = "confirmed_good") -> None:
        for each in drawn:
            self.say(each.request_id, label, self.store.path(each).read_bytes())


@pytest.fixture
def line(tmp_path: Path) -> Line:
    return Line(tmp_path)


def accepting(line: Line, **fields: object) -> Callable[[], object]:
    return lambda: accept_feedback(
        line.registry, line.store, "nut", why="glare", load=lambda _: BACKBONE, **fields
    )


def served(line: Line) -> PromptSet:
    return line.registry.load("nut", CHAMPION)[0]


def test_a_false_alarm_waits_is_promoted_by_its_gate_and_taken_back(line: Line) -> None:
    alarm = line.say("alarm", "false_alarm", part(GLARE, seed=7))
    line.say("defect", "confirmed_defect", part(SCRATCH, seed=8))
    used = accept_feedback(line.registry, line.store, "nut", why="glare", load=lambda _: BACKBONE)
    assert (used.accepted.source, used.accepted.version, used.accepted.move) == (1, 2, None)
    ((before, after),) = used.accepted.gate.alarms
    assert before > 0.05 > after
    assert line.registry.aliases()["nut"] == {CHAMPION: 1, CANDIDATE: 2}
    tags = line.registry.resolve("nut", CANDIDATE).tags
    assert (tags["accepted"], tags["feedback_by"]) == (
        "1 false alarms of version 1 accepted",
        "line-3",
    )
    promoted = promote(line.registry, "nut", why="looked at")
    assert promoted.move is not None
    assert "of 1 confirmed defects 1 were rejected and 1 are" in promoted.why
    assert [(each.id, each.by, each.use) for each in served(line).provenance.feedback] == [
        (alarm.id, "line-3", "memory")
    ]
    with pytest.raises(RegistryError, match="the memory has it already"):
        accepting(line, ids=[alarm.id])()
    roll_back(line.registry, "nut", why="it was no glare")
    # What is not in the memory that serves may join again.
    assert accept_feedback(
        line.registry, line.store, "nut", why="glare", dry_run=True, load=lambda _: BACKBONE
    ).given == (alarm,)


def test_a_defect_that_is_called_a_false_alarm_is_left_out(line: Line) -> None:
    alarm = line.say("alarm", "false_alarm", part(GLARE, seed=7))
    line.say("wrong", "false_alarm", part(SCRATCH, seed=8), by="line-4")
    defect = line.say("defect", "confirmed_defect", part(SCRATCH, seed=9))
    used = accept_feedback(line.registry, line.store, "nut", why="glare", load=lambda _: BACKBONE)
    assert [each.request_id for each in used.given] == ["alarm", "wrong"]
    assert used.defects == (defect,)
    assert used.accepted.acceptance is not None
    assert used.accepted.acceptance.blocked == ((), (0,))
    assert not used.accepted.gate.passing
    ((_, still),) = used.accepted.gate.defects
    assert still > 0.05
    joined = line.registry.load("nut", "2")[0].provenance
    assert ([each.id for each in joined.feedback], joined.accepted) == ([alarm.id], 1)
    with pytest.raises(GateError, match="would no longer reject"):
        accepting(line, ids=[used.given[1].id])()
    assert line.registry.versions("nut") == [2, 1]
    forced = accept_feedback(
        line.registry, line.store, "nut", why="glare", force=True, load=lambda _: BACKBONE
    )
    assert forced.accepted.gate.passing == (0,)
    # It is the candidate now, and only serves if that is forced again.
    assert promote(line.registry, "nut").verdict == "kept"


def test_what_callers_disagree_on_or_too_few_say_is_passed_over(line: Line) -> None:
    disputed = line.say("disputed", "false_alarm", part(SCRATCH, seed=7))
    defect = line.say("disputed", "confirmed_defect", part(SCRATCH, seed=7), by="line-4")
    with pytest.raises(RegistryError, match="callers disagree"):
        accepting(line)()
    line.say("alarm", "false_alarm", part(GLARE, seed=9))
    with pytest.raises(RegistryError, match="1 of 2 callers say so"):
        accepting(line, callers=2)()
    line.say("alarm", "false_alarm", part(GLARE, seed=9), by="line-4")
    used = accept_feedback(
        line.registry, line.store, "nut", why="x", callers=2, load=lambda _: BACKBONE
    )
    assert [each.request_id for each in used.given] == ["alarm"]
    assert [reason for _, reason in used.passed_over] == ["callers disagree"]
    # Whoever denies a defect does not take it out of the gate.
    assert used.defects == (defect,)
    line.store.withdraw("nut", disputed.id)
    for identifier, reason in ((disputed.id, "unknown"), ("junk", "unknown")):
        with pytest.raises(RegistryError, match=reason):
            accepting(line, ids=[identifier])()


def test_nobody_crowds_the_defects_of_others_out_of_the_gate(line: Line) -> None:
    mine = line.say("mine", "confirmed_defect", part(SCRATCH, seed=1))
    for seed in range(MOST_DEFECTS + 1):
        line.say(f"flood-{seed}", "confirmed_defect", part(GLARE, seed=seed), by="line-4")
    found = confirmed_defects(line.store, "nut")
    assert len(found) == MOST_DEFECTS
    assert mine in found


def test_no_more_than_asked_join_the_lowest_scores_first(line: Line) -> None:
    for seed in range(3):
        line.say(f"alarm-{seed}", "false_alarm", part((100 - 40 * seed, 60, 200), seed=seed))
    used = accept_feedback(
        line.registry, line.store, "nut", why="x", most=2, load=lambda _: BACKBONE
    )
    assert [each.request_id for each in used.given] == ["alarm-0", "alarm-1"]


def test_an_image_that_was_exchanged_is_not_used(line: Line) -> None:
    alarm = line.say("alarm", "false_alarm", part(GLARE, seed=7))
    Path(str(line.store.path(alarm))).write_bytes(part(SCRATCH, seed=8))
    with pytest.raises(RegistryError, match="not what was given"):
        accepting(line)()


def calibrating(line: Line, **fields: object) -> object:
    return calibrate_by_samples(
        line.registry, line.store, "nut", why="a sample", load=lambda _: BACKBONE, **fields
    )


def test_a_whole_sample_certifies_and_confirmed_parts_alone_do_not(line: Line) -> None:
    for seed in range(30, 60):
        line.say(f"chosen-{seed}", "confirmed_good", part(seed=seed))
    with pytest.raises(RegistryError, match="none was drawn"):
        calibrating(line)
    drawn = line.draw(19)
    line.judge(drawn[1:])
    with pytest.raises(RegistryError, match="1 of its 19 images are not judged"):
        calibrating(line)
    line.judge(drawn[:1])
    calibrating(line)
    promote(line.registry, "nut")
    threshold = served(line).threshold
    assert threshold.source == "calibration images"
    assert sorted(threshold.scores) == pytest.approx(sorted(each.score for each in drawn))
    assert threshold.certified_false_alarm_rate == 0.05
    assert threshold.value == pytest.approx(max(threshold.scores))
    assert len(served(line).provenance.feedback) == 19
    with pytest.raises(RegistryError, match="version 1 inspected it, and version 2 serves"):
        calibrating(line)


def test_a_sample_counts_for_its_good_parts_alone(line: Line) -> None:
    drawn = line.draw(5)
    line.judge(drawn[:3])
    line.judge(drawn[3:], "missed_defect")
    calibrating(line, force=True)
    scores = line.registry.load("nut", CANDIDATE)[0].threshold.scores
    assert sorted(scores) == pytest.approx(sorted(each.score for each in drawn[:3]))
    # What one says, another denies.
    line.say(drawn[0].request_id, "missed_defect", part(seed=100), by="line-4")
    with pytest.raises(RegistryError, match="callers disagree"):
        calibrating(line)
    line.store.withdraw("nut", drawn[1].id)
    with pytest.raises(RegistryError, match="images of it are missing"):
        calibrating(line)


def test_a_threshold_that_lets_a_confirmed_defect_pass_is_refused(line: Line) -> None:
    defect = part((200, 90, 90), seed=8)
    assert line.score(defect) > 0.05
    line.say("defect", "confirmed_defect", defect)
    drawn = [
        (line.feedback(f"drawn-{seed}", "sampled", part(GLARE, seed=seed)), part(GLARE), "png")
        for seed in range(3)
    ]
    for each in line.store.draw(drawn):
        line.say(each.request_id, "false_alarm", part(GLARE))
    with pytest.raises(GateError, match="would no longer reject"):
        calibrating(line)
    assert line.registry.versions("nut") == [1]
