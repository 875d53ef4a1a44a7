"""What a prompt set makes of labelled test images: reported with it, never used for choosing."""

from collections.abc import Collection

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from apt_ray.data.folders import Category
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.features.protocol import Backbone
from apt_ray.files import Location
from apt_ray.images import read_image
from apt_ray.validation.evaluation import METRICS, TestSet
from apt_ray.validation.intervals import ImageScores
from apt_ray.validation.metrics import counts_above, precision_recall_curve, roc_curve
from tuning.report.plots import render
from tuning.report.sheets import draw_sheet

_SHOWN = 4


def report_labelled(
    backbone: Backbone, prompt_set: PromptSet, category: Category, *, support: Collection[Location]
) -> tuple[dict[str, float], dict[str, Image.Image]]:
    """Metrics `test.*` in 0..1, and images; nothing unless some are normal, some anomalous."""
    if len({image.is_anomalous for image in category.test}) < 2:
        return {}, {}
    test = TestSet.read(category, prompt_set.reading)
    places, _ = test.held_out(support)
    if len({category.test[place].is_anomalous for place in places}) < 2:
        return {}, {}
    detector = Detector(backbone, prompt_set)
    features = test.encode(backbone, lambda _what, _done, _total: None)
    result = test.result(
        lambda places: detector.score(features[places]),
        variant="both",
        support=support,
        seed=prompt_set.settings.seed,
    )
    values = {name: getattr(result, name) for name in METRICS}
    metrics = {f"test.{name}": value for name, value in values.items() if value is not None}
    return metrics, {
        "test_scores": _draw_scores(result.scores, prompt_set.threshold.value),
        "test_pictures": _draw_extremes(backbone, prompt_set, category, result.scores),
    }


def _draw_scores(scores: ImageScores, threshold: float) -> Image.Image:
    """ROC, precision and recall, and a histogram with the threshold."""
    figure = Figure(figsize=(7.6, 2.7), dpi=100, layout="constrained")
    roc, recall, histogram = figure.subplots(1, 3)
    truth, score_I = scores.is_anomalous_I, scores.score_I
    counts = counts_above(score_I, truth)
    roc.plot(*roc_curve(*counts))
    roc.set(xlabel="share of good parts rejected", ylabel="share of defects found", title="ROC")
    recall.plot(*precision_recall_curve(*counts))
    recall.set(xlabel="recall", ylabel="precision", title="precision and recall", ylim=(0, 1.02))
    bins = np.histogram_bin_edges(score_I, 20)
    for label, chosen in (("good", ~truth), ("defective", truth)):
        histogram.hist(score_I[chosen], bins=bins, alpha=0.6, label=label)
    histogram.axvline(threshold, color="black", linestyle="--", label="threshold")
    histogram.set(xlabel="anomaly score", title="scores")
    histogram.legend()
    return render(figure)


def _draw_extremes(
    backbone: Backbone, prompt_set: PromptSet, category: Category, scores: ImageScores
) -> Image.Image:
    """The defects that score highest and lowest, and the good parts that score highest."""
    order = np.argsort(scores.score_I)
    defects = [place for place in order if scores.is_anomalous_I[place]]
    good = [place for place in order if not scores.is_anomalous_I[place]]
    half = _SHOWN // 2
    chosen = {
        "clearest": defects[: -half - 1 : -1],
        "faintest": defects[:half],
        "good, but": good[: -_SHOWN - 1 : -1],
    }
    images = {
        f"{label} {scores.names[place]}": read_image(
            category.root / scores.names[place], prompt_set.reading
        )
        for label, places in chosen.items()
        for place in places
    }
    return draw_sheet(backbone, prompt_set, images)
