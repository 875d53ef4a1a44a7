from pathlib import Path

from tests.serving.transcripts import transcripts

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "errors.md"


def test_the_documented_errors_are_those_that_are_answered() -> None:
    assert DOCUMENT.read_text() == transcripts(), (
        "run: python -m tests.serving.transcripts docs/errors.md"
    )


def test_every_kind_of_error_is_documented() -> None:
    lines = DOCUMENT.read_text().splitlines()
    statuses = {line.split()[1] for line in lines if line.startswith("HTTP/1.1")}
    assert statuses == {
        "400",
        "401",
        "403",
        "404",
        "406",
        "409",
        "413",
        "415",
        "422",
        "429",
        "500",
        "503",
        "507",
    }
