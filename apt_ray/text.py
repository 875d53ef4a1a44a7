"""Text that everybody can read: file names are bytes, and hold what no terminal or JSON takes."""


def printable(value: object) -> str:
    """`str(value)` in one line: what is not printable, such as a line break or a byte of a file
    name that is not UTF-8, as Python's escape of it."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in str(value)
    )


def duration(seconds: float) -> str:
    """A length of time as a person says it: 45 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
