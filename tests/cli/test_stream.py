import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from apt_ray.cli.main import main
from apt_ray.data.samples.belt import draw_belt
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.images import encode_jpeg, read_image

SIZE = 96


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [frame.image for frame in draw_belt(["good", "rust", "good"], seed=1, size=SIZE)]


@pytest.fixture(scope="module")
def alarmed(prompt_set: PromptSet, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prompt set to which everything is a defect, and whose good pictures are washers."""
    file = tmp_path_factory.mktemp("set") / "set.safetensors"
    good = [frame.image for frame in draw_belt(["good"] * 2, seed=2, size=SIZE)][::15]
    threshold = prompt_set.threshold.moved_to(0.0)
    pictures = tuple(encode_jpeg(image, side=SIZE) for image in good)
    replace(prompt_set.with_threshold(threshold), thumbnails=pictures).save(file)
    return str(file)


def inspect(*arguments: object) -> int:
    return main(["inspect", *map(str, arguments)])


def save(images: Sequence[Image.Image], folder: Path) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    return folder


def test_a_folder_of_frames_leaves_events_scores_timeline_and_overlays(
    alarmed: str,
    images: list[Image.Image],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, results = tmp_path / "out", tmp_path / "results.json"
    frames = save(images, tmp_path / "frames")
    assert inspect(alarmed, frames, "--fps", 10, "--out", out, "--json", results) == 0
    said = capsys.readouterr().out
    found: dict[str, Any] = json.loads(results.read_text())
    events = found["events"]
    assert events == [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events] == ["anomaly"] * 3  # every part
    for event in events:
        assert f"{event['start_s']:.2f} to {event['end_s']:.2f} s" in said
        assert read_image(out / f"event-{event['number']:04d}.png").size == (SIZE, SIZE)
    assert found["summary"]["frames"] == len(images)
    assert found["summary"]["no_part"] > found["summary"]["inspected"] >= 3
    header, *rows = (out / "scores.csv").read_text().splitlines()
    assert header == "frame,seconds,verdict,score"
    assert len(rows) == len(images)
    assert rows[10].startswith("10,1.000,")
    assert (out / "timeline.svg").read_text().startswith("<svg")


def test_a_pipe_is_a_stream(alarmed: str, images: list[Image.Image], tmp_path: Path) -> None:
    piped = b"".join(encode_jpeg(image, side=SIZE, quality=95) for image in images)
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "apt_ray", "inspect", alarmed, "-", "--json", str(results)]
    ran = subprocess.run([*command, "--every", "2"], input=piped, capture_output=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert json.loads(results.read_text())["summary"]["frames"] == (len(images) + 1) // 2
    ran = subprocess.run(command, input=b"no image" * 10_000, capture_output=True, check=False)
    assert ran.returncode == 1
    assert b"ffmpeg" in ran.stderr


def test_a_frame_that_the_end_of_a_pipe_cuts_off_is_told(
    alarmed: str, images: list[Image.Image]
) -> None:
    piped = b"".join(encode_jpeg(image, side=SIZE, quality=95) for image in images[:4])
    command = [sys.executable, "-m", "apt_ray", "inspect", alarmed, "-", "--json", "-"]
    command += ["--every", "2", "--part", "any"]  # also of a frame that is passed over
    ran = subprocess.run(command, input=piped[:-100], capture_output=True, check=False)
    assert ran.returncode == 0
    summary = json.loads(ran.stdout)["summary"]  # the JSON alone
    assert (summary["frames"], summary["damaged"], summary["is_cut_off"]) == (3, 1, True)
    assert b"frame 3 is cut off: the stream ended within it" in ran.stderr
    assert b"warning: the stream ended within a frame" in ran.stderr
    ran = subprocess.run(command, input=piped, capture_output=True, check=False)
    assert not json.loads(ran.stdout)["summary"]["is_cut_off"]
    assert b"warning" not in ran.stderr


def test_flags_of_a_video_are_refused_where_there_is_none(
    alarmed: str, images: list[Image.Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = save(images[:2], tmp_path / "frames")
    for flags in (
        ["--event-frames", "3"],
        ["--no-gate", "--every", "2"],
        ["--part", "whole"],
        ["--batch", "1"],
    ):
        assert inspect(alarmed, frames, *flags) == 1
        said = capsys.readouterr()
        assert (said.out, all(flag in said.err for flag in flags if flag[:1] == "-")) == ("", True)
        assert "give --fps" in said.err


def test_overlays_are_no_frames_of_the_next_run(
    alarmed: str, images: list[Image.Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = save(images[:2], tmp_path / "frames")
    (tmp_path / "link").symlink_to(frames)
    for out in (frames, frames / "out", tmp_path / "link"):
        assert inspect(alarmed, frames, "--fps", 10, "--out", out) == 1
        assert "would lie among the frames" in capsys.readouterr().err
    assert len(list(frames.iterdir())) == 2


def test_an_animation_is_a_stream_by_its_name_or_by_its_rate(
    alarmed: str, images: list[Image.Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix, options in (("gif", ()), ("webp", ("--fps", 5))):
        file = tmp_path / f"belt.{suffix}"
        images[0].save(file, save_all=True, append_images=images[1:6], duration=40)
        assert inspect(alarmed, file, "--part", "any", *options) == 0
        assert "6 frames in" in capsys.readouterr().out
    assert inspect(alarmed, tmp_path / "belt.webp") == 0  # one image without a rate
    assert "frames in" not in capsys.readouterr().out


def test_what_cannot_be_is_said(
    alarmed: str, prompt_set: PromptSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(alarmed, "belt.mp4", "other.png") == 1
    assert "one is inspected at a time" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        inspect(alarmed, "belt.gif", "--every", "0")
    assert "which frames" in capsys.readouterr().err
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert inspect(alarmed, damaged, "--fps", 1) == 1
    assert "no frame could be decoded" in capsys.readouterr().err
    older = tmp_path / "older.safetensors"
    replace(prompt_set, thumbnails=()).save(older)
    file = tmp_path / "empty.gif"
    Image.new("RGB", (32, 32)).save(file)
    assert inspect(older, file) == 0
    assert "all frames are inspected" in capsys.readouterr().err
    assert inspect(alarmed, file) == 0
    assert "--part any" in capsys.readouterr().err


def test_an_empty_pipe_is_an_error(alarmed: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "apt_ray", "inspect", alarmed, "-"],
        input=b"",
        capture_output=True,
        check=False,
    )
    assert ran.returncode == 1
    assert b"no frame" in ran.stderr
