"""Where frames come from: folders, animated images, video files, and pipes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from apt_ray.data.folders import images_below
from apt_ray.errors import DataError, ImageError, MissingDependencyError, SettingsError
from apt_ray.files import StrPath
from apt_ray.images import decode_image, read_image, with_ground
from apt_ray.levels import Reading
from apt_ray.optional import require
from apt_ray.video.splitter import ImageSplitter

ANIMATION_SUFFIXES = frozenset({".gif", ".apng", ".png", ".webp", ".tif", ".tiff"})
MOTION_JPEG_SUFFIXES = frozenset({".mjpeg", ".mjpg"})
VIDEO_SUFFIXES = frozenset(
    {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
)
_UNTOLD_FPS = 25.0
_CHUNK = 64 * 2**10
_MOST_BYTES = 256 * 2**20  # of one frame: what comes through a pipe has no end by itself


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Frame:
    """One frame of a stream, decoded when it is asked for.

    Attributes:
        index: its number in the stream, from 0; those that are passed over count.
        time_s: seconds from the first frame.
        load: gives the frame as an RGB image; raises ImageError or DataError if it is damaged.
        is_cut_off: whether the stream ended within it; `load` raises then.
    """

    index: int
    time_s: float
    load: Callable[[], Image.Image]
    is_cut_off: bool = False


class Every:
    """Which frames of one stream are looked at: each `frames`-th, and one in each `seconds`."""

    def __init__(self, *, frames: int = 1, seconds: float = 0.0) -> None:
        self._frames, self._seconds = frames, seconds
        self._due_s = 0.0

    @classmethod
    def parse(cls, text: str) -> Every:
        """`5` is each fifth frame, `0.2s` one in each fifth of a second. Raises SettingsError."""
        found = re.fullmatch(r"(\d{1,9})|(\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})s", text.strip())
        if found is None or not float(found[1] or found[2]):
            raise SettingsError(
                f"{text!r} does not say which frames: give a number of frames like 5, or of seconds"
                f" like 0.2s"
            )
        return cls(frames=int(found[1])) if found[1] else cls(seconds=float(found[2]))

    def takes(self, index: int, time_s: float) -> bool:
        """Whether the next frame is looked at."""
        # What a clock's rounding puts before its time is on time.
        if index % self._frames or time_s < self._due_s - 1e-6:
            return False
        self._due_s += self._seconds
        if self._due_s <= time_s:  # behind a gap
            self._due_s = time_s + self._seconds
        return True


def is_stream(path: Path) -> bool:
    """Whether a file's name says that it holds frames of a video and not one image."""
    suffix = path.suffix.lower()
    return suffix in VIDEO_SUFFIXES | MOTION_JPEG_SUFFIXES | {".gif", ".apng"}


def read_frames(path: StrPath, reading: Reading, *, fps: float | None = None) -> Iterator[Frame]:
    """The frames of a folder of numbered images, an animated image, or a video file.

    Args:
        path: of either.
        reading: how files of images are read.
        fps: frames in a second; None takes what the file says, or 25 where it says nothing.

    Raises:
        DataError: It cannot be read; MissingDependencyError: `av` is needed for it.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_dir():
        yield from _of_folder(path, reading, fps or _UNTOLD_FPS)
    elif suffix in ANIMATION_SUFFIXES:
        yield from _of_animation(path, reading, fps)
    elif suffix in MOTION_JPEG_SUFFIXES:
        try:
            with path.open("rb") as file:
                yield from frames_of_pipe(file, reading, fps=fps or _UNTOLD_FPS)
        except OSError as error:
            raise DataError(f"cannot read {path} ({error.strerror}): check the path") from error
    else:
        yield from _of_video(path, fps)


def frames_of_pipe(
    pipe: BinaryIO, reading: Reading, *, fps: float | None = None
) -> Iterator[Frame]:
    """The JPEG and PNG files that come through a pipe, one behind the other; one that its end cuts
    off is the last.

    Args:
        pipe: is read as far as it has something.
        reading: how the files are read.
        fps: frames in a second; None takes the times at which they come.

    Raises:
        ImageError: What comes is no stream of images.
    """
    splitter = ImageSplitter(max_bytes=_MOST_BYTES)
    index, started = 0, 0.0

    def time_s() -> float:
        nonlocal started
        now = time.monotonic()
        started = started or now  # with the first frame
        return index / fps if fps else now - started

    read: Callable[[int], bytes] = getattr(pipe, "read1", pipe.read)
    while data := read(_CHUNK):
        for file in splitter.feed(data):
            yield Frame(index=index, time_s=time_s(), load=_decoding(file, reading, index))
            index += 1
    if splitter.has_part:
        yield Frame(index=index, time_s=time_s(), load=partial(_cut_off, index), is_cut_off=True)


def _cut_off(index: int) -> Image.Image:
    raise ImageError(f"frame {index} is cut off: the stream ended within it")


def _decoding(file: bytes, reading: Reading, index: int) -> Callable[[], Image.Image]:
    return partial(decode_image, file, source=f"frame {index}", reading=reading)


def _of_folder(folder: Path, reading: Reading, fps: float) -> Iterator[Frame]:
    for index, path in enumerate(sorted(images_below(folder), key=_by_number)):
        yield Frame(index=index, time_s=index / fps, load=partial(read_image, path, reading))


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Where a path stands: `frame10.png` behind `frame9.png`."""
    return [
        (int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))
    ]


def _of_animation(path: Path, reading: Reading, fps: float | None) -> Iterator[Frame]:
    try:
        animation = Image.open(path)
    except OSError as error:
        raise DataError(f"cannot read {path} ({error}): check it, or save it again") from error
    with animation:
        time_s = 0.0
        for index in range(getattr(animation, "n_frames", 1)):
            try:
                animation.seek(index)
                image = with_ground(animation, reading.ground)
            except Exception as error:  # Pillow raises nearly anything on damaged files
                raise DataError(
                    f"frame {index} of {path} is damaged ({error}): save it again"
                ) from error
            yield Frame(index=index, time_s=index / fps if fps else time_s, load=image.copy)
            time_s += animation.info.get("duration", 0) / 1000 or 1 / _UNTOLD_FPS


def _of_video(path: Path, fps: float | None) -> Iterator[Frame]:
    if not path.is_file():
        raise DataError(f"cannot read {path}: it is no file; check the path")
    try:
        require("av", extra="video")
    except MissingDependencyError as error:
        raise MissingDependencyError(
            f"{path} is a video file: {error}; or without it: ffmpeg -i {path} -f image2pipe"
            f" -c:v mjpeg -q:v 2 - | apt-ray inspect SET -"
        ) from None
    import av

    try:
        with av.open(str(path)) as container:
            video = next(iter(container.streams.video), None)
            if video is None:
                raise DataError(f"{path} has no video: give another file")
            video.thread_type = "AUTO"
            rate = float(video.average_rate or _UNTOLD_FPS)
            first_s: float | None = None
            for index, frame in enumerate(container.decode(video)):
                told_s = index / rate if frame.pts is None else frame.time
                first_s = told_s if first_s is None else first_s
                time_s = index / fps if fps else told_s - first_s
                yield Frame(index=index, time_s=time_s, load=frame.to_image)
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{path} cannot be decoded ({error}): convert it and retry") from error
