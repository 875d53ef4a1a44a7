from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from serving.api.problems import ProblemError
from serving.replica.admission import Admission

SMALL = 1000  # bytes of a file that is decoded in no time


@pytest.fixture
def held() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def admit(
    admission: Admission, held: ExitStack, name: str, count: int = 1, timeout_s: float | None = None
) -> int:
    """The status with which the first of so many images is refused; 200 if all may wait."""
    try:
        for _ in range(count):
            held.enter_context(admission.admitted(name, SMALL, timeout_s))
    except ProblemError as error:
        return error.problem.status if int((error.headers or {})["Retry-After"]) else 0
    return 200


def admission_of(max_wait_s: float, *, shared: bool = False, **costs: float) -> Admission:
    admission = Admission(max_wait_s=max_wait_s, shared=shared, decoders=2)
    for name, seconds in costs.items():
        admission.expect(name, seconds)
    return admission


def test_the_measured_cost_decides_how_many_may_wait(held: ExitStack) -> None:
    for cost, many in ((0.03125, 64), (0.25, 8), (3.0, 0)):
        admission = admission_of(2, nut=cost)
        assert admit(admission, held, "nut", many + 1) == 200  # the first has its turn at once
        assert admit(admission, held, "nut") == 503
    # What is measured soon outweighs what was expected.
    admission = admission_of(2, nut=3.0)
    for _ in range(50):
        admission.took("nut", "model", 0.25)
    assert admit(admission, held, "nut", 8) == 200
    assert admit(admission, held, "nut", 2) == 503


def test_files_that_take_longer_than_the_model_set_the_pace(held: ExitStack) -> None:
    admission = admission_of(2, nut=0.01)
    for _ in range(60):
        admission.took("nut", "decode", 0.7)
        admission.took("nut", "conclude", 0.3)
    assert admit(admission, held, "nut", 5) == 200  # two threads: 0.5 s an image
    assert admit(admission, held, "nut") == 503
    # Before any is measured, their size tells.
    fresh = admission_of(2, nut=0.01)
    for _ in range(6):
        held.enter_context(fresh.admitted("nut", 20_000_000, None))
    assert admit(fresh, held, "nut") == 503


def test_a_given_time_stands_in_the_place_of_the_limit(held: ExitStack) -> None:
    admission = admission_of(2, nut=0.5)
    assert admit(admission, held, "nut", timeout_s=0.25) == 503  # it takes longer than that alone
    assert admit(admission, held, "nut", 5) == 200
    assert admit(admission, held, "nut") == 503
    assert admit(admission, held, "nut", timeout_s=2.5) == 503
    assert admit(admission, held, "nut", timeout_s=3.25) == 200


def test_images_that_are_done_make_room() -> None:
    admission = admission_of(1, nut=2.0)
    for _ in range(3):
        with ExitStack() as held:
            assert admit(admission, held, "nut") == 200
            assert admit(admission, held, "nut") == 503
            assert admission.waiting == 1
    assert admission.waiting == 0


def test_in_a_shared_replica_each_category_waits_behind_its_own(held: ExitStack) -> None:
    admission = admission_of(1, shared=True, nut=0.125, bolt=0.125, screw=0.125)
    assert admit(admission, held, "nut", 9) == 200
    assert admit(admission, held, "nut") == 429
    # One image of each in turn: the flood is as long as it is for itself alone.
    assert admit(admission, held, "bolt", 4) == 200
    assert admit(admission, held, "screw") == 200
    assert admit(admission, held, "nut") == 429
    # With many categories even the first image of another would come too late.
    for number in range(6):
        name = f"part-{number}"
        admission.expect(name, 0.125)
        assert admit(admission, held, name) == 200
    assert admit(admission, held, "pin") == 503
    assert admit(admission, held, "nut") == 503


def test_a_dear_category_delays_the_cheap_ones_by_its_cost(held: ExitStack) -> None:
    admission = admission_of(1, shared=True, dear=0.75, cheap=0.125)
    assert admit(admission, held, "dear") == 200
    assert admit(admission, held, "cheap", 3) == 200
    assert admit(admission, held, "cheap") == 429
