import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from apt_ray.cli.main import main
from apt_ray.config import FitSettings
from apt_ray.data.folders import Category
from apt_ray.detection.calibration import calibrate
from apt_ray.errors import WriteError
from apt_ray.features.clip import FrozenCLIP
from apt_ray.validation.evaluation import Result, evaluate
from apt_ray.validation.examples import choose
from apt_ray.validation.report.html import write_report


class Page(HTMLParser):
    """What the tests ask of a page: its tags with their attributes, and whether they close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))


@pytest.fixture(scope="module")
def results(backbone: FrozenCLIP, category: Category) -> list[Result]:
    return evaluate(
        category,
        backbone=backbone,
        shots=2,
        seeds=(0,),
        settings=FitSettings(steps=2),
        examples=2,
    )


def test_the_page_holds_everything_and_fetches_nothing(
    results: list[Result], backbone: FrozenCLIP, category: Category, tmp_path: Path
) -> None:
    path = write_report(tmp_path / "new", results, backbone=backbone, settings=FitSettings())
    assert [file.name for file in path.parent.iterdir()] == ["index.html"]
    text = path.read_text()
    page = Page(text)
    assert page.open == [], "every tag is closed"
    assert sum(tag == "svg" for tag, _ in page.tags) == 5
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 2 * len(results[-1].examples)
    assert all(source is not None and source.startswith("data:image/") for source in sources)
    # Names of XML dialects are addresses that nobody calls.
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert all(
        address.startswith(
            (
                "http://www.w3.org/",
                "http://purl.org/",
                "http://creativecommons.org/",
                "https://matplotlib.org",
            )
        )
        for address in addresses
    )
    assert not any(tag in ("script", "link", "iframe") for tag, _ in page.tags)
    assert f"{100 * results[-1].image_auroc:.1f}" in text  # type: ignore[operator]
    both = results[-1]
    assert both.verdicts is not None
    assert "<td class=text>estimated from 2 left-out support images</td>" in text
    for rejected in (both.verdicts.good, both.verdicts.defects, *both.verdicts.by_type.values()):
        low, high = rejected.interval
        assert f"{rejected.count} of {rejected.images}: {100 * rejected.share:.1f} %" in text
        assert f"({100 * low:.1f} to {100 * high:.1f})" in text


def test_a_certified_threshold_says_so_and_categories_have_a_mean(
    results: list[Result], backbone: FrozenCLIP, tmp_path: Path
) -> None:
    certified = calibrate([0.3] * 19, false_alarm_rate=0.05)
    others = [
        replace(one, category="other", examples=(), threshold=one.threshold and certified)
        for one in results
    ]
    path = write_report(tmp_path, results + others, backbone=backbone, settings=FitSettings())
    text = path.read_text()
    assert "<td class=text>certified at 5.0% from 19 calibration images</td>" in text
    assert text.count("<td class=text>mean of 2</td>") == 3


def test_examples_are_telling(results: list[Result], category: Category) -> None:
    *others, both = results
    assert all(result.examples == () and result.threshold is None for result in others)
    assert {example.kind for example in both.examples} == {"best", "worst", "borderline"}
    assert len({example.image.path for example in both.examples}) == len(both.examples) == 12
    scores = dict(zip(both.scores.names, both.scores.score_I, strict=True))
    for example in both.examples:
        name = example.image.path.relative_to(category.root).as_posix()
        assert example.score == pytest.approx(scores[name], abs=1e-5)


def test_best_worst_and_borderline() -> None:
    score_I = np.array([0.1, 0.2, 0.9, 0.45, 0.3, 0.8, 0.95, 0.55])
    is_anomalous_I = np.array([False] * 4 + [True] * 4)
    chosen: dict[str, list[int]] = {}
    for kind, i in choose(score_I, is_anomalous_I, 0.5, 1):
        chosen.setdefault(kind, []).append(i)
    assert chosen == {"worst": [4, 2], "best": [6, 0], "borderline": [3, 7]}
    assert len(list(choose(score_I, is_anomalous_I, 0.5, 9))) == 8
    assert list(choose(score_I, is_anomalous_I, 0.5, 0)) == []


def test_names_from_folders_are_escaped_and_missing_masks_are_said(
    results: list[Result], backbone: FrozenCLIP, tmp_path: Path
) -> None:
    hostile = [
        replace(
            result,
            category="<script>",
            pixel_auroc=None,
            aupro=None,
            examples=(),
            scores=replace(result.scores, normal_IH=None, anomalous_IH=None),
        )
        for result in results
    ]
    text = write_report(tmp_path, hostile, backbone=backbone, settings=FitSettings()).read_text()
    assert "<script>" not in text
    assert "No masks: pixel figures do not exist." in text


def test_a_folder_that_cannot_be_written_is_named(
    results: list[Result], backbone: FrozenCLIP, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"cannot write .*index.html \(a file is where a folder"):
        write_report(tmp_path / "file", results, backbone=backbone, settings=FitSettings())


def test_evaluate_writes_the_report(
    sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = min(sample_data.iterdir()).name
    options = ["--categories", name, "--shots", "1", "--seeds", "0", "--steps", "1"]
    status = main(
        ["evaluate", "--data", str(sample_data), *options, "--report", str(tmp_path / "report")]
    )
    assert status == 0
    page = tmp_path / "report" / "index.html"
    assert f"report: {page}" in capsys.readouterr().out
    assert f"Evaluation of {name}" in page.read_text()
