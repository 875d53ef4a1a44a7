"""What several benchmarks share."""

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import optuna
import psutil
import torch
from PIL import Image

from apt_ray.anomalies.bank import SupportBank, encode_support
from apt_ray.anomalies.spec import BankSpec
from apt_ray.config import BUILTIN, BackboneSpec, FitSettings, Precision
from apt_ray.data.folders import find_categories
from apt_ray.data.samples.factory import write_samples
from apt_ray.features.clip import FrozenCLIP, load_backbone
from apt_ray.features.protocol import Backbone
from apt_ray.features.torchvision_guard import import_open_clip
from apt_ray.images import read_image
from tuning.space import PROMPT_SPACE, Space, distributions

optuna.logging.set_verbosity(optuna.logging.WARNING)

_CATEGORY = "washer"


class CpuMeter:
    """Processor seconds of this process and all below it, while entered.

    A process that lives for less than a tenth of a second may be missed.
    """

    def __enter__(self) -> "CpuMeter":
        self._end = threading.Event()
        self._before = self._read()
        self._now = dict(self._before)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    @property
    def seconds(self) -> float:
        return sum(self._now.values()) - sum(self._before.values())

    def _run(self) -> None:
        while not self._end.wait(0.2):
            self._now |= self._read()
        self._now |= self._read()

    def _read(self) -> dict[int, float]:
        seconds = {}
        this = psutil.Process()
        for process in (this, *this.children(recursive=True)):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                times = process.cpu_times()
                seconds[process.pid] = times.user + times.system
        return seconds


def timed(part: Callable[[], object], device: torch.device) -> float:
    """Seconds of the clock, until the device has done its work too."""
    started = time.perf_counter()
    part()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def median_seconds(
    part: Callable[[], object], device: torch.device, repeats: int, *, warm_ups: int = 1
) -> float:
    """The median of `repeats` times, after some that do not count."""
    for _ in range(warm_ups):
        timed(part, device)
    return statistics.median(timed(part, device) for _ in range(repeats))


def random_weights(name: str, folder: Path) -> BackboneSpec:
    """An architecture of open_clip with random weights, which cost what real ones do."""
    if name == BUILTIN:
        return BackboneSpec()
    file = folder / f"{name}.pt"
    if not file.exists():
        torch.manual_seed(0)
        model = import_open_clip().create_model(name, pretrained=None)
        torch.save(model.state_dict(), file)
    return BackboneSpec(name=name, pretrained=str(file), quick_gelu=False)


def load(name: str, *, device: str, precision: Precision = "float32") -> FrozenCLIP:
    """The backbone of that name, for one process."""
    with TemporaryDirectory() as folder:
        spec = random_weights(name, Path(folder)).model_copy(update={"precision": precision})
        return load_backbone(spec, device=device)


def sample_images(count: int) -> list[Image.Image]:
    """Normal images of a sample product."""
    with TemporaryDirectory() as folder:
        write_samples(Path(folder))
        (category,) = find_categories(Path(folder), [_CATEGORY])
        return [read_image(path) for path in category.good[:count]]


def sample_bank(
    backbone: Backbone, images: Sequence[Image.Image], *, strengths: Sequence[float]
) -> SupportBank:
    """The bank of images of `sample_images`."""
    spec = BankSpec(
        fingerprint=backbone.fingerprint,
        support=tuple(f"sample {place}" for place in range(len(images))),
        seed=0,
        strengths=tuple(strengths),
    )
    return encode_support(backbone, images, spec)


def searched_settings(count: int, *, steps: int) -> list[FitSettings]:
    """Settings of prompts as a random search draws them."""
    return [FitSettings.parse({"steps": steps, **point}) for point in drawn(PROMPT_SPACE, count)]


def drawn(
    space: Space, count: int, *, first: Mapping[str, Any] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """Points of a space as a random search draws them, behind the first where it is given."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    if first:
        study.enqueue_trial(dict(first))
    known = distributions(space)
    return [study.ask(fixed_distributions=known).params for _ in range(count)]
