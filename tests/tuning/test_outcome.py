import pytest
from ray.exceptions import RayTaskError

from apt_ray.errors import DataError
from tuning.outcome import Outcome


def test_an_error_of_a_user_is_told_without_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcome = Outcome()
    cause = DataError("a.png is damaged: replace it")
    outcome.fail("washer", RayTaskError("encode_bank", "Traceback ...", cause))
    assert outcome.failures == {"washer": "a.png is damaged: replace it"}
    shown = capsys.readouterr()
    assert "washer failed: a.png is damaged" in shown.out
    assert shown.err == ""


def test_an_error_of_the_program_is_told_with_its_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcome = Outcome()
    outcome.fail("washer", ZeroDivisionError("division by zero"))
    assert outcome.failures == {"washer": "ZeroDivisionError: division by zero"}
    assert "ZeroDivisionError" in capsys.readouterr().err
