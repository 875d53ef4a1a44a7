"""What a version holds: its files, and what MLflow shows of it.

A version is first written to a folder whole, so that it can be sent to the registry later, or
again, without the process that made it:

    record.json                     metrics, parameters and tags
    version/MLmodel                 makes it an MLflow pyfunc, with its signature
    version/prompt_set.safetensors
    version/trials.csv              the trials of its search
    version/data.json               SHA-256 of every file that it was made from, of the pixels too
                                    for the support set and what is held out
    version/held_out/*.png          normal images outside the support set, for promotions
    version/pictures/*.png          what is drawn for people
"""

import csv
import hashlib
import json
import re
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as library_version
from pathlib import Path

import yaml
from PIL import Image

from apt_ray.config import CATEGORY_NAME
from apt_ray.data.distinct import Distinct, pixel_digest
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import RegistryError, SettingsError
from apt_ray.files import Location, file_sha256
from apt_ray.images import encode_png, read_image
from apt_ray.levels import Reading
from apt_ray.text import printable

DIRECTORY = "version"
"""The one directory of artifacts of a version: registration keeps no other (mlflow#18581)."""

PROMPT_SET = "prompt_set.safetensors"
TRIALS = "trials.csv"
DATA = "data.json"
PICTURES = "pictures"
HELD_OUT = "held_out"

MAX_HELD_OUT = 8
"""The most normal images that a version keeps for promotions."""

_RECORD = "record.json"
_HELD_OUT_SIDE = 384
_LIBRARIES = ("apt-ray", "torch", "open_clip_torch", "numpy", "mlflow", "ray")
_INPUTS = [{"type": "binary", "required": True}]
_OUTPUTS = [
    {"name": "anomaly_score", "type": "double", "required": True},
    {"name": "threshold", "type": "double", "required": True},
    {"name": "is_anomalous", "type": "boolean", "required": True},
    {"name": "p_value", "type": "double", "required": False},
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What MLflow shows of a version, beside its files.

    Attributes:
        submission: identifies this version among all attempts to register it.
        pictures: names of what is drawn for people, in the order in which it is shown.
        tags: provenance, kept with the run.
        version_tags: the few that every listing of models carries, so a thousand categories are
            listed quickly.
        may_serve: whether it becomes the champion of a category that has none.
    """

    submission: str
    category: str
    pictures: tuple[str, ...]
    metrics: Mapping[str, float]
    params: Mapping[str, str]
    tags: Mapping[str, str]
    version_tags: Mapping[str, str]
    may_serve: bool = True

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """The record in a version's folder; RegistryError if there is none."""
        try:
            fields = json.loads((folder / _RECORD).read_text())
            return cls(**{**fields, "pictures": tuple(fields["pictures"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RegistryError(
                f"{folder} is not a version that waits to be registered ({error}): remove it"
            ) from error


def write_version(
    folder: Path,
    prompt_set: PromptSet,
    *,
    pictures: Mapping[str, Image.Image],
    trials: Sequence[Mapping[str, object]],
    tags: Mapping[str, str],
    support: Sequence[Location],
    held_out: Sequence[Location],
    submission: str | None = None,
    may_serve: bool = True,
) -> Record:
    """Write all of a version to an empty folder.

    Raises:
        SettingsError: The category's name cannot name a registered model and an address.
        DataError: An image cannot be read.
    """
    if not re.fullmatch(CATEGORY_NAME, prompt_set.category):
        raise SettingsError(
            f"{prompt_set.category!r} cannot name a category: use letters, digits, '-' and '_'"
        )
    home = folder / DIRECTORY
    (home / PICTURES).mkdir(parents=True)
    data = prompt_set.to_bytes()
    (home / PROMPT_SET).write_bytes(data)
    for name, picture in pictures.items():
        (folder / picture_path(name)).write_bytes(encode_png(picture))
    if trials:
        with (home / TRIALS).open("w", newline="") as file:
            table = csv.DictWriter(file, fieldnames=list(trials[0]))
            table.writeheader()
            table.writerows(trials)
    data_hash = _write_data(home, support, held_out, prompt_set.reading)
    _write_model(home)
    threshold = prompt_set.threshold
    rate = threshold.certified_false_alarm_rate
    version_tags = {"fingerprint": prompt_set.fingerprint, "sha256": sha256(data)}
    record = Record(
        submission=submission or uuid.uuid4().hex,
        may_serve=may_serve,
        category=prompt_set.category,
        pictures=tuple(pictures),
        metrics={
            **prompt_set.metrics,
            "threshold": threshold.value,
            "calibration_images": len(threshold.scores),
        },
        params={name: str(value) for name, value in _params(prompt_set).items()},
        tags={
            **version_tags,
            "category": prompt_set.category,
            "backbone": prompt_set.backbone.name,
            "certified_rate": "uncertified" if rate is None else f"{rate:g}",
            "support_hash": prompt_set.support_hash,
            **({"data_hash": data_hash} if data_hash else {}),
            "threshold": repr(threshold.value),
            "calibration": f"{len(threshold.scores)} {threshold.source}",
            **{f"library.{name}": version for name, version in _libraries()},
            **tags,
        },
        version_tags=version_tags,
    )
    (folder / _RECORD).write_text(json.dumps(asdict(record), indent=2))
    return record


def inherit_images(folder: Path, found: Path) -> None:
    """Add what another version says of its images, its `DATA` or `HELD_OUT`, to a written one."""
    home = folder / DIRECTORY
    if found.name == DATA:
        theirs = json.loads(found.read_text())
        ours = json.loads((home / DATA).read_text()) if (home / DATA).exists() else {}
        merged = {kind: {**theirs.get(kind, {}), **ours.get(kind, {})} for kind in theirs}
        (home / DATA).write_text(json.dumps(merged, indent=2))
    else:
        (home / HELD_OUT).mkdir(exist_ok=True)
        for file in found.glob("*.png"):
            (home / HELD_OUT / file.name).write_bytes(file.read_bytes())


def picture_path(name: str) -> str:
    """Where an image lies among a run's artifacts."""
    return f"{DIRECTORY}/{PICTURES}/{name}.png"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _params(prompt_set: PromptSet) -> dict[str, object]:
    backbone = prompt_set.backbone.model_dump()
    return {
        **prompt_set.settings.model_dump(),
        "shots": prompt_set.provenance.shots,
        **{f"backbone.{key}": value for key, value in backbone.items()},
    }


def _libraries() -> Iterator[tuple[str, str]]:
    for name in _LIBRARIES:
        try:
            yield name, library_version(name)
        except PackageNotFoundError:
            continue  # Ray is not everywhere


def _write_data(
    home: Path, support: Sequence[Location], held_out: Sequence[Location], reading: Reading
) -> str | None:
    """Fingerprints of all images, small copies of some held-out ones; a hash of the whole."""
    if not support:
        return None
    digests = {path: file_sha256(path) for path in (*support, *held_out)}
    pixels: dict[str, str] = {}
    distinct = Distinct()
    kept = 0
    for path in (*support, *held_out):
        if kept == MAX_HELD_OUT:
            break
        image, digest = read_image(path, reading), digests[path]
        pixels[digest] = pixel_digest(image)
        if distinct.admit(path, pixels[digest]) and path not in support:
            (home / HELD_OUT).mkdir(exist_ok=True)
            image.thumbnail((_HELD_OUT_SIDE, _HELD_OUT_SIDE), Image.Resampling.BICUBIC)
            (home / HELD_OUT / f"{digest}.png").write_bytes(encode_png(image))
            kept += 1
    fingerprints = {
        "support": {printable(path.name): digests[path] for path in support},
        "held_out": {printable(path.name): digests[path] for path in held_out},
        "pixels": pixels,
    }
    (home / DATA).write_text(json.dumps(fingerprints, indent=2))
    return sha256("".join(sorted(digests.values())).encode())


def _write_model(home: Path) -> None:
    """The files by which MLflow knows a pyfunc, of the code that is installed as apt-ray."""
    python = ".".join(map(str, sys.version_info[:3]))
    model = {
        "flavors": {
            "python_function": {
                "loader_module": "apt_ray.registry.pyfunc",
                "env": {"virtualenv": "python_env.yaml"},
                "python_version": python,
            }
        },
        "mlflow_version": library_version("mlflow"),
        "model_uuid": uuid.uuid4().hex,
        "signature": {"inputs": json.dumps(_INPUTS), "outputs": json.dumps(_OUTPUTS)},
        "utc_time_created": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S.%f}",
    }
    # By hand: MLflow's own writer takes seconds to import, and warns about itself.
    (home / "MLmodel").write_text(yaml.safe_dump(model))
    (home / "requirements.txt").write_text(f"apt-ray[registry]=={library_version('apt-ray')}\n")
    (home / "python_env.yaml").write_text(
        f"python: {python}\nbuild_dependencies:\n- pip\ndependencies:\n- -r requirements.txt\n"
    )
