import io

import numpy as np
import pytest
from PIL import Image

from apt_ray.errors import ImageError, ImageTooLargeError
from apt_ray.images import decode_image, encode_png
from apt_ray.video.splitter import ImageSplitter


def noise(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))


def jpeg(seed: int, **options: object) -> bytes:
    buffer = io.BytesIO()
    noise(seed).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def with_preview(file: bytes) -> bytes:
    """The file with a whole JPEG in its EXIF, as cameras store one."""
    content = b"Exif\0\0" + jpeg(99)
    return file[:2] + b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content + file[2:]


FILES = [
    jpeg(0),
    encode_png(noise(1)),
    jpeg(2, progressive=True),
    with_preview(jpeg(3)),
    jpeg(4, restart_marker_blocks=1),
]


def test_files_come_out_as_they_went_in_however_the_bytes_are_cut() -> None:
    stream = b"".join(FILES)
    for size in (1, 7, 1000, len(stream)):
        splitter = ImageSplitter(max_bytes=10_000)
        found = [
            file
            for start in range(0, len(stream), size)
            for file in splitter.feed(stream[start : start + size])
        ]
        assert found == FILES
        assert not splitter.has_part


def test_what_stands_between_images_is_passed_over() -> None:
    part = b"\r\n--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n"
    stream = b"".join(part % len(file) + file for file in FILES) + b"\r\n--frame--\r\n"
    splitter = ImageSplitter(max_bytes=10_000)
    assert [file for place in range(len(stream)) for file in splitter.feed(stream[place:][:1])] == (
        FILES
    )


def test_an_image_that_is_cut_is_known_and_a_damaged_one_costs_no_other() -> None:
    splitter = ImageSplitter(max_bytes=10_000)
    assert splitter.feed(FILES[0][:-1]) == []
    assert splitter.has_part
    assert splitter.feed(FILES[0][-1:]) == [FILES[0]]

    damaged = bytearray(FILES[0])
    damaged[20:40] = b"\0" * 20  # a length and what follows it
    first, *others = splitter.feed(bytes(damaged) + FILES[1] + FILES[2])
    assert others[-1] == FILES[2]
    with pytest.raises(ImageError, match="damaged"):
        decode_image(first)


def test_no_stream_and_too_large_images_are_refused() -> None:
    splitter = ImageSplitter(max_bytes=200)
    with pytest.raises(ImageTooLargeError, match="200 bytes"):
        splitter.feed(FILES[0])
    with pytest.raises(ImageError, match="ffmpeg"):
        ImageSplitter(max_bytes=10_000_000).feed(b"no image " * 10_000)
