import pytest

from tuning.actors import room_for_trials
from tuning.settings import EngineSettings


@pytest.mark.parametrize(
    ("cpus", "threads", "engines", "room"),
    [
        ([2], None, 0, 2),
        ([16, 0, 4], None, 0, 20),
        ([16, 3], 2, 0, 9),  # a trial does not spread over two nodes
        ([2], 4, 0, 1),  # Ray says what it lacks
        ([16, 16], None, 2, 16),
        ([2, 2, 2], 1, 3, 24),
    ],
)
def test_as_many_trials_run_as_the_cluster_has_room_for(
    cpus: list[int], threads: int | None, engines: int, room: int
) -> None:
    nodes = [{"Resources": {"CPU": float(count)} if count else {}} for count in cpus]
    settings = EngineSettings(threads=threads)
    assert room_for_trials(nodes, settings, shared_engines=engines) == room
