"""Processes of servers that a test has started."""

from contextlib import suppress

import psutil


def processes_below(pid: int, title: str) -> list[psutil.Process]:
    """Those below a process whose command line contains `title`, as Ray's is `ray::Actor`."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it may end just now
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found
