"""The Markdown that a person finds in MLflow: the page of a category and that of a version."""

import json
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import urlencode

from apt_ray.registry.contents import Record, picture_path
from apt_ray.registry.history import Move
from apt_ray.registry.protocol import CANDIDATE, CHAMPION
from apt_ray.tables import markdown

_SHOWN_MOVES = 10
_SPACE = "&emsp;"
_REPORT_ENDS = "\n\n---\n\n"
_PROVENANCE = (
    "git_commit",
    "ray.job_id",
    "ray.submission_id",
    "search_verdict",
    "support_seeds",
    "fingerprint",
    "support_hash",
    "data_hash",
    "sha256",
    "calibration",
)


def describe_category(category: str, moves: Sequence[Move] = ()) -> str:
    """The page of a registered model."""
    shown = [
        (
            str(move.number),
            move.at[:16].replace("T", " "),
            move.who,
            move.action,
            f"{move.source or '-'} → {move.target}",
            move.why,
        )
        for move in reversed(moves[-_SHOWN_MOVES:])
    ]
    history = _table(("", "when (UTC)", "who", "what", "version", "why"), shown)
    return f"""\
Finds defects in images of **{category}**. Each version is a prompt set that apt-ray tuned from a
few normal images.

- `{CHAMPION}` is the version that serves, `{CANDIDATE}` the newest one.
- To let the candidate serve: `apt-ray registry promote {category}`
- To go back: `apt-ray registry rollback {category}`
- To inspect an image, ask the fleet:
  `curl --data-binary @part.png http://FLEET/v1/{category}/inspect`
- To load it in Python: `mlflow.pyfunc.load_model("models:/apt-{category}@{CHAMPION}")`

### What has served

{history or "Nothing yet."}
"""


def describe_version(record: Record, run_id: str) -> str:
    """The page of a version; a list of versions shows the first line of it."""
    metrics, tags, params = record.metrics, record.tags, record.params
    certified = tags["certified_rate"]
    promise = (
        "uncertified, for want of normal images outside the support set"
        if certified == "uncertified"
        else f"at most {certified} of good parts rejected"
    )
    validation = f"validation {_spread(metrics, 'validation')}, " if "validation" in metrics else ""
    families = {
        name.removeprefix("validation."): value
        for name, value in metrics.items()
        if name.startswith("validation.")
    }
    tests = {
        name.removeprefix("test."): value
        for name, value in metrics.items()
        if name.startswith("test.")
    }
    searched = ("context_length", "noise_strength", "smgs_weight", "learning_rate")
    others = [name for name, value in params.items() if name not in searched and value != "None"]
    sections = [
        f"{validation}threshold {metrics['threshold']:.4f} ({promise}), "
        f"{params['shots']} shots, backbone {tags['backbone']}",
    ]
    if families:
        sections += [
            "### Validation (AUROC on perturbed normal images; what it was chosen by)",
            _table(families, [[f"{value:.3f}" for value in families.values()]]),
        ]
    if tests:
        sections += [
            "### Labelled test images (reported, never used for choosing)",
            _table(tests, [[f"{value:.3f}" for value in tests.values()]]),
        ]
    sections += [
        "### Settings",
        _table(searched, [[_number(params[name]) for name in searched]]),
        "Others: " + ", ".join(f"{name} {_number(params[name])}" for name in others),
        "### Where it comes from",
        _table(
            ("", ""),
            [(name, f"`{tags[name]}`") for name in _PROVENANCE if name in tags]
            + [("libraries", _libraries(tags))],
        ),
        f"The table of its trials: [trials.csv]({_artifact(run_id, 'version/trials.csv')})."
        " The run holds all files, metrics and tags.",
    ]
    for name in record.pictures:
        url = _artifact(run_id, picture_path(name))
        sections.append(f"### {name.replace('_', ' ').capitalize()}\n\n![{name}]({url})")
    return "\n\n".join(sections)


def with_report(page: str, report: str) -> str:
    """A version's page with a report under its first line, in place of an earlier one."""
    headline, _, rest = page.partition("\n\n")
    return f"{headline}\n\n{_spaced(report)}{_REPORT_ENDS}{rest.rpartition(_REPORT_ENDS)[2]}"


def _artifact(run_id: str, path: str) -> str:
    """Relative to the page, so that any name of the server will do."""
    return "get-artifact?" + urlencode({"path": path, "run_uuid": run_id})


def _libraries(tags: Mapping[str, str]) -> str:
    prefix = "library."
    return ", ".join(
        f"{name.removeprefix(prefix)} {tags[name]}" for name in tags if name.startswith(prefix)
    )


def _spread(metrics: Mapping[str, float], name: str) -> str:
    sd = metrics.get(f"{name}_sd")
    return f"{metrics[name]:.4f}" + ("" if sd is None else f" ± {sd:.4f}")


def _number(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return f"{value:.4g}" if isinstance(value, float) else text


def _table(header: Iterable[str], rows: Sequence[Sequence[str]]) -> str:
    return _spaced(markdown(list(header), rows)) if rows else ""


def _spaced(text: str) -> str:
    """MLflow sets the cells of a table without any distance."""
    return text.replace(" | ", f"{_SPACE} | ")
