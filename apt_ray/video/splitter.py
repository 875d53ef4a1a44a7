"""Image files out of a stream of bytes in which they stand one behind the other.

That is what `ffmpeg -f image2pipe` writes, what cameras send as `multipart/x-mixed-replace`, and
what a file of Motion JPEG is.
"""

from __future__ import annotations

import re

from apt_ray.errors import ImageError, ImageTooLargeError

_START = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n")
_LONGEST_START = 8
# In a JPEG's scan: a marker that is neither stuffing, nor a restart, nor filled up.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers that nothing belongs to
_END_OF_IMAGE, _START_OF_SCAN = 0xD9, 0xDA
# Headers between two images have some hundred bytes.
_MOST_BETWEEN = 64 * 2**10


class ImageSplitter:
    """Cuts JPEG and PNG files out of bytes as they come.

    What stands between two images, such as the boundaries and headers of a multipart body, is
    passed over. An image ends where its own structure says so, so a preview inside of it is none.

    Args:
        max_bytes: of one image.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._at = 0  # how far the image at the buffer's start was read; 0 between two images
        self._in_scan = False
        self._between = 0

    @property
    def has_part(self) -> bool:
        """Whether an image has begun and not ended."""
        return self._at > 0

    def feed(self, data: bytes) -> list[bytes]:
        """The images that end in these bytes.

        Raises:
            ImageTooLargeError: An image has more bytes than are accepted.
            ImageError: What comes is no stream of images.
        """
        self._buffer += data
        found = []
        while (file := self._next()) is not None:
            found.append(file)
        if max(map(len, (*found, self._buffer))) > self._max_bytes:
            raise ImageTooLargeError(
                f"an image of the stream has more than the {self._max_bytes:,} bytes accepted: send"
                f" smaller or more compressed images"
            )
        return found

    def _next(self) -> bytes | None:
        if not self._at and not self._begin():
            return None
        is_png = self._buffer[0] == 0x89
        end = self._end_of_png() if is_png else self._end_of_jpeg()
        if end is None:
            return None
        file = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._at, self._in_scan = 0, False
        return file

    def _begin(self) -> bool:
        """Brings the next image to the buffer's start."""
        start = _START.search(self._buffer)
        passed = start.start() if start else max(0, len(self._buffer) - _LONGEST_START + 1)
        del self._buffer[:passed]
        self._between = 0 if start else self._between + passed
        if self._between > _MOST_BETWEEN:
            raise ImageError(
                "no JPEG or PNG file in the last 64 KiB of the stream: send image files one behind"
                " the other, such as `ffmpeg -i VIDEO -f image2pipe -c:v mjpeg -q:v 2 -` writes"
            )
        self._at = (2 if self._buffer[0] == 0xFF else _LONGEST_START) if start else 0
        return start is not None

    def _end_of_png(self) -> int | None:
        while self._at + 12 <= len(self._buffer):
            length = int.from_bytes(self._buffer[self._at : self._at + 4], "big")
            kind = self._buffer[self._at + 4 : self._at + 8]
            if kind == b"IEND":
                return self._at + 12 + length if self._has(12 + length) else None
            if length > self._max_bytes:
                return self._at + 8  # damaged: whoever decodes it says so
            if not self._has(12 + length):
                return None
            self._at += 12 + length
        return None

    def _end_of_jpeg(self) -> int | None:
        while True:
            if self._in_scan:
                marker = _MARKER.search(self._buffer, self._at)
                if marker is None:
                    # The last byte may be the first of a marker.
                    self._at = max(self._at, len(self._buffer) - 1)
                    return None
                self._at, self._in_scan = marker.start(), False
            if not self._has(2):
                return None
            first, kind = self._buffer[self._at : self._at + 2]
            if first != 0xFF:
                return self._at  # damaged: whoever decodes it says so
            if kind == _END_OF_IMAGE:
                return self._at + 2
            if kind == 0xFF or kind in _ALONE:
                self._at += 1 if kind == 0xFF else 2
                continue
            if not self._has(4):
                return None
            length = 2 + int.from_bytes(self._buffer[self._at + 2 : self._at + 4], "big")
            if not self._has(length):
                return None
            self._at += length
            self._in_scan = kind == _START_OF_SCAN

    def _has(self, count: int) -> bool:
        return self._at + count <= len(self._buffer)
