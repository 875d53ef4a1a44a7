import inspect
import json
import re
from pathlib import Path

from serving.replica import meter

DASHBOARD = Path(meter.__file__).parents[1] / "dashboard.json"


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    queries = " ".join(
        target["expr"] for panel in dashboard["panels"] for target in panel["targets"]
    )
    shown = set(re.findall(r"ray_apt_(\w+?)(?:_total|_bucket|_sum|_count)?\b", queries))
    source = inspect.getsource(meter)
    counted = set(re.findall(r"_(?:counter|histogram)\(\s*\"(\w+)\"", source))
    counted |= set(re.findall(r"\{PREFIX\}(\w+)\"", source))
    assert shown == counted
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for panel in dashboard["panels"]:
        assert panel["title"]
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")
