import io
from pathlib import Path

import pytest
from PIL import Image

from apt_ray.errors import DataError, ImageError, MissingDependencyError, SettingsError
from apt_ray.levels import UNTOLD
from apt_ray.video.frames import Every, frames_of_pipe, is_stream, read_frames


def gray(level: int) -> Image.Image:
    return Image.new("RGB", (16, 12), (level, level, level))


def levels(path: Path, fps: float | None = None) -> list[tuple[int, float, int]]:
    return [
        (frame.index, round(frame.time_s, 3), frame.load().getpixel((0, 0))[0])  # type: ignore[index]
        for frame in read_frames(path, UNTOLD, fps=fps)
    ]


def test_a_folder_of_numbered_frames_is_read_in_their_order(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        gray(number * 10).save(tmp_path / f"frame{number}.png")
    assert levels(tmp_path, fps=10) == [(0, 0.0, 10), (1, 0.1, 20), (2, 0.2, 100)]


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animations_tell_their_own_times(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"belt.{suffix}"
    frames = [gray(level) for level in (0, 80, 240)]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=200, **options)
    assert levels(file) == [(0, 0.0, 0), (1, 0.2, 80), (2, 0.4, 240)]
    assert [time_s for _, time_s, _ in levels(file, fps=2)] == [0.0, 0.5, 1.0]
    assert is_stream(file) is (suffix == "gif")


def test_a_tiff_has_frames_too(tmp_path: Path) -> None:
    gray(0).save(tmp_path / "stack.tif", save_all=True, append_images=[gray(9)])
    assert levels(tmp_path / "stack.tif", fps=1) == [(0, 0.0, 0), (1, 1.0, 9)]


def test_a_pipe_gives_frames_and_says_which_are_damaged() -> None:
    files = []
    for level in (0, 255):
        buffer = io.BytesIO()
        gray(level).save(buffer, "PNG")
        files.append(buffer.getvalue())
    damaged = bytearray(files[0])
    damaged[41:49] = b"\xff" * 8  # where the pixels begin
    frames = list(frames_of_pipe(io.BytesIO(files[0] + damaged + files[1]), UNTOLD, fps=10))
    assert [round(frame.time_s, 2) for frame in frames] == [0.0, 0.1, 0.2]
    assert frames[2].load().getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ImageError, match="frame 1"):
        frames[1].load()
    times = [frame.time_s for frame in frames_of_pipe(io.BytesIO(files[0] + files[1]), UNTOLD)]
    assert times[0] == 0.0 <= times[1]


def test_a_frame_that_the_end_cuts_off_is_the_last_one(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    for level in (0, 200):
        gray(level).save(buffer, "JPEG")
    (tmp_path / "belt.mjpeg").write_bytes(buffer.getvalue()[:-20])
    whole, cut = read_frames(tmp_path / "belt.mjpeg", UNTOLD, fps=10)
    assert (whole.is_cut_off, cut.is_cut_off, cut.index, cut.time_s) == (False, True, 1, 0.1)
    with pytest.raises(ImageError, match="frame 1 is cut off: the stream ended within it"):
        cut.load()


def test_motion_jpeg_is_read_from_a_file(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    for level in (0, 200):
        gray(level).save(buffer, "JPEG")
    (tmp_path / "belt.mjpeg").write_bytes(buffer.getvalue())
    assert [index for index, _, _ in levels(tmp_path / "belt.mjpeg")] == [0, 1]


def test_every_takes_some_of_the_frames() -> None:
    def taken(text: str) -> list[int]:
        every = Every.parse(text)
        return [index for index in range(20) if every.takes(index, index / 10)]

    assert taken("1") == list(range(20))
    assert taken("7") == [0, 7, 14]
    assert taken("0.5s") == [0, 5, 10, 15]
    assert taken(".25s") == [0, 3, 5, 8, 10, 13, 15, 18]
    for text in ("0", "0s", "-1", "s", "two", "1e9", "3f"):
        with pytest.raises(SettingsError, match="which frames"):
            Every.parse(text)


def test_after_a_gap_one_frame_is_taken_and_not_all_that_are_due() -> None:
    every = Every.parse("1s")
    times = [0.0, 0.5, 10.0, 10.1, 10.9, 11.0]
    assert [time_s for place, time_s in enumerate(times) if every.takes(place, time_s)] == [
        0.0,
        10.0,
        11.0,
    ]


def test_a_video_file_is_decoded(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="video files need the extra `video`")
    file = tmp_path / "belt.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        for level in (0, 100, 200):
            image = Image.new("RGB", (64, 48), (level, level, level))
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    found = levels(file)
    assert [(index, time_s) for index, time_s, _ in found] == [(0, 0.0), (1, 0.1), (2, 0.2)]
    assert all(
        abs(level - told) < 8 for (_, _, level), told in zip(found, (0, 100, 200), strict=True)
    )
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match="convert it"):
        levels(file)


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no file"):
        levels(tmp_path / "absent.mp4")
    (tmp_path / "belt.gif").write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=r"belt\.gif"):
        levels(tmp_path / "belt.gif")
    (tmp_path / "belt.mp4").write_bytes(b"0000ftyp")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    monkeypatch.setattr("apt_ray.optional.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"apt-ray\[video\].*ffmpeg -i .*belt.mp4"):
        levels(tmp_path / "belt.mp4")
