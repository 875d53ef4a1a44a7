"""The page itself: tables, curves, and images with their maps."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from apt_ray.config import FitSettings
from apt_ray.data.distinct import describe_copies
from apt_ray.detection.calibration import Threshold
from apt_ray.detection.rule import resize_map
from apt_ray.features.protocol import Backbone
from apt_ray.files import write_whole
from apt_ray.images import draw_overlay, read_image, read_mask
from apt_ray.validation.evaluation import HEADER, Result, percent, summarise
from apt_ray.validation.examples import Example
from apt_ray.validation.intervals import by_defect_type
from apt_ray.validation.report import curves
from apt_ray.validation.verdicts import Rejected
from apt_ray.version import __version__

_SIDE = 220
_TRUTH = (60, 220, 110)

_KINDS = {
    "worst": (
        "Worst",
        "Defective images with the lowest scores, good ones with the highest: what is missed, and"
        " what raises false alarms.",
    ),
    "borderline": ("Borderline", "Of the others, those whose scores are nearest to the threshold."),
    "best": ("Best", "Defective images with the highest scores, good ones with the lowest."),
}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2329; background: #fff; margin: 0 auto;
       max-width: 1400px; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .4rem; border-bottom: 1px solid #d7dde2; }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; }
p { margin: .3rem 0; max-width: 70ch; }
.quiet { color: #5b6670; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; border-bottom: 1px solid #e7ebee;
         white-space: nowrap; }
th { font-weight: 600; }
th.text, td.text { text-align: left; }
.figures { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); }
.figures svg { width: 100%; height: auto; max-width: 460px; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); }
figure { margin: 0; }
figure div { display: flex; gap: 4px; }
figure img { width: calc(50% - 2px); height: auto; object-fit: contain; background: #eef1f3; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
.wrong { color: #b3261e; font-weight: 600; }
.right { color: #1f7a3d; font-weight: 600; }
"""


def write_report(
    folder: Path,
    results: Sequence[Result],
    *,
    backbone: Backbone,
    settings: FitSettings,
) -> Path:
    """Write `folder/index.html` about an evaluation; returns its path.

    Scripts, styles and images are all inside; nothing is fetched when it is read. WriteError if
    it cannot be written.
    """
    path = folder / "index.html"
    write_whole(path, _page(results, backbone, settings))
    return path


def _page(results: Sequence[Result], backbone: Backbone, settings: FitSettings) -> str:
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        groups.setdefault((result.category, result.shots), []).append(result)
    sections = "".join(_category(name, shots, group) for (name, shots), group in groups.items())
    names = ", ".join(dict.fromkeys(name for name, _ in groups))
    seeds = ", ".join(map(str, dict.fromkeys(result.seed for result in results)))
    chosen = ", ".join(
        f"{key} {value}" for key, value in settings.model_dump(exclude={"seed"}).items()
    )
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    model = " ".join(filter(None, (backbone.spec.name, backbone.spec.pretrained)))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>apt-ray: {escape(names)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Evaluation of {escape(names)}</h1>
<p class="quiet">{now}, apt-ray {__version__}; backbone {escape(model)},
{backbone.input_size} px, {backbone.spec.precision}, fingerprint {backbone.fingerprint};
seeds {seeds}</p>
<p class="quiet">{escape(chosen)}</p>
<p>In percent, mean and standard deviation over the seeds. <i>prompts</i> uses the learned prompts
alone, <i>reference</i> the support images' patches alone, <i>both</i> is what a prompt set
serves. <i>Good rejected</i> and <i>defects found</i> are the shares of the normal and of the
defective test images above the prompt set's threshold.</p>
{_table(HEADER, summarise(results), text_columns=(0, 2))}
{sections}
</body>
</html>
"""


def _category(name: str, shots: int, results: Sequence[Result]) -> str:
    served = next(result for result in results if result.threshold is not None)
    copies = tuple(dict.fromkeys(copy for result in results for copy in result.copies))
    figures = [
        curves.draw_scores(served),
        curves.draw_roc(results),
        curves.draw_precision_recall(results),
    ]
    if all(result.scores.normal_IH is not None for result in results):
        figures += [curves.draw_pixel_roc(results), curves.draw_pixel_precision_recall(results)]
    else:
        figures.append("<p class='quiet'>No masks: pixel figures do not exist.</p>")
    return (
        f"<h2>{escape(name)}, {shots} shots</h2>"
        f"<p class='quiet'>{escape(describe_copies(copies))}</p>"
        f"{_verdicts_table(results)}"
        f"<div class='figures'>{''.join(figures)}</div>"
        f"{_types_table(served)}"
        f"{_examples(served)}"
    )


def _verdicts_table(results: Sequence[Result]) -> str:
    """What each seed's threshold is, and what it does to the test images."""
    rows = [
        (
            str(result.seed),
            f"{result.threshold.value:.3f}",
            _origin(result.threshold),
            _rejected(result.verdicts.good),
            _rejected(result.verdicts.defects),
        )
        for result in results
        if result.threshold is not None and result.verdicts is not None
    ]
    head = ("seed", "threshold", "which is", "good rejected", "defects found")
    return (
        "<h3>At the threshold</h3><p class='quiet'>A certified threshold rejects at most that share"
        " of good parts, on average over draws of the calibration images; an estimated one promises"
        " nothing. In parentheses the 95 % interval (Clopper and Pearson), in percent.</p>"
        + _table(head, rows, text_columns=(2,))
    )


def _origin(threshold: Threshold) -> str:
    rate = threshold.certified_false_alarm_rate
    made = "estimated" if rate is None else f"certified at {rate:.1%}"
    return f"{made} from {len(threshold.scores)} {threshold.source}"


def _rejected(rejected: Rejected) -> str:
    low, high = (f"{100 * bound:.1f}" for bound in rejected.interval)
    return f"{rejected.count} of {rejected.images}: {percent([rejected.share])} % ({low} to {high})"


def _types_table(result: Result) -> str:
    assert result.verdicts is not None
    rows = [
        (
            figures.defect_type,
            _rejected(result.verdicts.by_type[figures.defect_type]),
            percent([figures.image_auroc]),
            percent([figures.pixel_auroc]),
        )
        for figures in by_defect_type(result.scores)
    ]
    title = f"<h3>By defect type, both, seed {result.seed}</h3>"
    head = ("defect type", "found", "image AUROC", "pixel AUROC")
    return title + _table(head, rows, text_columns=(0,))


def _examples(result: Result) -> str:
    assert result.threshold is not None
    parts = []
    for kind, (title, text) in _KINDS.items():
        shown = [example for example in result.examples if example.kind == kind]
        if shown:
            cards = "".join(_card(example, result.threshold) for example in shown)
            parts.append(
                f"<h3>{title}</h3><p class='quiet'>{text}</p><div class='cards'>{cards}</div>"
            )
    if parts:
        parts.insert(
            0,
            "<p class='quiet'>Below, left the image, its true defect outlined in green; right its"
            " anomaly map, what lies above the threshold outlined in white.</p>",
        )
    return "".join(parts)


def _card(example: Example, threshold: Threshold) -> str:
    image = read_image(example.image.path, example.reading)
    map_HW = resize_map(example.map_SS, image.size).numpy()
    overlay = draw_overlay(image, map_HW, threshold=threshold.value)
    if example.image.mask is not None and example.image.is_anomalous:
        image = _outline(image, read_mask(example.image.mask, image.size))
    is_alarm = threshold.rejects(example.score)
    is_right = is_alarm == example.image.is_anomalous
    verdict = "rejected" if is_alarm else "accepted"
    label = f"{example.image.defect_type}/{example.image.path.name}"
    return (
        f"<figure><div>{_picture(image, label)}{_picture(overlay, f'anomaly map of {label}')}</div>"
        f"<figcaption>{escape(label)}: score {example.score:.3f},"
        f" <span class='{'right' if is_right else 'wrong'}'>{verdict}</span></figcaption></figure>"
    )


def _outline(image: Image.Image, mask_HW: NDArray[np.bool_]) -> Image.Image:
    width = max(1, round(min(image.size) / 150))
    ring_HW = ndimage.binary_dilation(mask_HW, iterations=width) & ~mask_HW
    pixels_HW3 = np.asarray(image).copy()
    pixels_HW3[ring_HW] = _TRUTH
    return Image.fromarray(pixels_HW3)


def _picture(image: Image.Image, label: str) -> str:
    image.thumbnail((2 * _SIDE, 2 * _SIDE))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{escape(label)}" loading="lazy" src="data:image/jpeg;base64,{data}">'


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: Sequence[int]
) -> str:
    def cells(values: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=text' if place in text_columns else ''}>{escape(value)}</{tag}>"
            for place, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f"<div class='scroll'><table><thead><tr>{cells(head, 'th')}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )
