"""What the version before has left: read, or refused with what is to be done."""

from pathlib import Path

import pytest

from apt_ray.errors import FleetError
from serving.settings import Fleet

WRITTEN_BY_0_1 = Path(__file__).with_name("fleet_0_1.yaml")


def test_the_fleet_file_of_0_1_is_read_but_for_what_cannot_be_converted(tmp_path: Path) -> None:
    with pytest.raises(
        FleetError, match=r"defaults: .*max_queue is of 0\.1: .*max_wait_s"
    ) as refused:
        Fleet.read(WRITTEN_BY_0_1)
    assert str(refused.value).count(";") == 0, "nothing else is refused"
    lines = WRITTEN_BY_0_1.read_text().splitlines()
    path = tmp_path / "fleet.yaml"
    path.write_text("\n".join(line for line in lines if "max_queue:" not in line))
    # It names every default of then, which are those of today; what is new has its own.
    assert Fleet.read(path) == Fleet()


def test_the_old_setting_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text("pools: {tail: {max_queue: 3}}\n")
    with pytest.raises(FleetError, match=r"pools\.tail: .*max_queue is of 0\.1"):
        Fleet.read(path)
