"""What runs PyTorch on the cluster: engines, one a GPU or a node, and tasks that encode."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from PIL import Image
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from apt_ray.anomalies.bank import SupportBank, encode_support
from apt_ray.anomalies.cache import EncodedCache, Some, SomeSpec
from apt_ray.anomalies.spec import BankSpec, JudgeSpec
from apt_ray.config import BackboneSpec, FitSettings
from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import SettingsError
from apt_ray.features.clip import load_backbone
from apt_ray.features.protocol import Backbone
from apt_ray.files import Location
from apt_ray.images import find_reading, read_image
from apt_ray.prompts.fit import fit
from apt_ray.validation.judge import Judge, encode_judge
from apt_ray.validation.versions import VersionComparison, compare_prompt_sets
from tuning.banks import CategoryBanks, EncodedRefs
from tuning.calls import RungCall, RungResult
from tuning.engine import Engine
from tuning.report.labelled import report_labelled
from tuning.report.sheets import draw_perturbed, draw_support
from tuning.settings import EngineSettings

_READY_TIMEOUT_S = 300.0
_IDLE_S = 10.0
TRIALS_PER_ENGINE = 8
"""Trials that run at a time for each engine that they share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FitJob:
    """The fit of a category's winner on all shots.

    Attributes:
        category: Its name.
        support: Files of the support images.
        calibration: Files of further normal images.
        backbone: What the winner sees images with.
        settings: Of the winner.
        metrics: Figures kept with the prompt set.
        labelled: Whose labelled images are reported on, where there are any; they choose nothing.
    """

    category: str
    support: Sequence[Location]
    calibration: Sequence[Location]
    backbone: BackboneSpec
    settings: FitSettings
    metrics: Mapping[str, float]
    labelled: Category | None = None


class EngineActor:
    """An Engine as a Ray actor; it can be lost at any time, as it keeps nothing between calls."""

    def __init__(self, backbone: BackboneSpec, *, device: str, threads: int) -> None:
        self._threads = threads
        self._refs: dict[str, ObjectRef[SupportBank | Judge]] = {}
        self._engine = Engine(
            load_backbone(backbone, device=device),
            lambda digest: ray.get(self._refs[digest]),
            threads=threads,
        )

    def fingerprint(self) -> str:
        """The backbone's; answers once the engine is ready."""
        return self._engine.backbone.fingerprint

    def fingerprints(self, backbones: Sequence[BackboneSpec]) -> list[str]:
        """Those of others, which are loaded for it."""
        return [self._loaded(backbone).fingerprint for backbone in backbones]

    def submit(self, call: RungCall, encoded: EncodedRefs) -> None:
        self._refs.update(encoded)
        self._engine.submit(call)

    def collect(self, call_id: str, timeout_s: float) -> RungResult | None:
        return self._engine.collect(call_id, timeout_s)

    def forget(self, call_id: str) -> None:
        self._engine.forget(call_id)

    def drain(self) -> None:
        self._engine.drain()

    def fit(self, job: FitJob, banks: EncodedRefs) -> tuple[bytes, dict[str, Image.Image]]:
        """The prompt set of the best settings, as its file, and images of what it sees.

        The first of `banks` is that of the job's support set.
        """
        torch.set_num_threads(self._threads)
        self._refs.update(banks)
        backbone = self._loaded(job.backbone)
        is_own = backbone is self._engine.backbone
        prompt_set = fit(
            job.category,
            job.support,
            job.settings,
            backbone=backbone,
            calibration=job.calibration,
            bank=self._engine.bank(next(iter(banks))) if is_own else None,
        ).with_metrics(job.metrics)
        images = [read_image(path, prompt_set.reading) for path in job.support]
        pictures = {
            "support_images": draw_support(backbone, prompt_set, images),
            "perturbations": draw_perturbed(backbone, prompt_set, images[0]),
        }
        if job.labelled is None:
            return prompt_set.to_bytes(), pictures
        metrics, drawn = report_labelled(backbone, prompt_set, job.labelled, support=job.support)
        return prompt_set.with_metrics(metrics).to_bytes(), pictures | drawn

    def _loaded(self, backbone: BackboneSpec) -> Backbone:
        """The engine's, where it is that one."""
        own = self._engine.backbone
        return own if backbone == own.spec else load_backbone(backbone, device=own.device.type)

    def compare(
        self, candidate: bytes, champion: bytes, images: Sequence[Image.Image]
    ) -> VersionComparison:
        """Two versions of a prompt set, as their files, on normal images that neither has seen."""
        torch.set_num_threads(self._threads)
        backbone = self._engine.backbone
        return compare_prompt_sets(
            PromptSet.from_bytes(candidate),
            PromptSet.from_bytes(champion),
            images,
            backbone=backbone,
            device=backbone.device.type,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Engines:
    """The engines of a search; the first of them has loaded its backbone.

    Attributes:
        actors: One a GPU, or one a node; a single one where trials do not ask them.
        are_shared: Whether trials ask them; else each trial has an engine of its own, and these
            fit the winners.
        threads: PyTorch's threads in each.
        live_trials: How many trials may run at a time.
        fingerprint: Of the backbone.
    """

    actors: tuple["ActorHandle[Any]", ...]
    are_shared: bool
    threads: int
    live_trials: int
    fingerprint: str
    _turns: Iterator[int] = field(default_factory=itertools.count, repr=False)

    def fit(self, job: FitJob, banks: EncodedRefs) -> tuple[bytes, dict[str, Image.Image]]:
        """The prompt set of the best settings, as its file, and images of what it sees."""
        fit: Any = self._next().fit.options(max_task_retries=-1)
        fitted: tuple[bytes, dict[str, Image.Image]] = ray.get(fit.remote(job, dict(banks)))
        return fitted

    def compare(
        self, candidate: PromptSet, champion: PromptSet, images: Sequence[Image.Image]
    ) -> VersionComparison:
        """Two versions of a prompt set on normal images that neither has seen."""
        files = [prompt_set.to_bytes() for prompt_set in (candidate, champion)]
        compare: Any = self._next().compare.options(max_task_retries=-1)
        comparison: VersionComparison = ray.get(compare.remote(*files, list(images)))
        return comparison

    def fingerprints(self, backbones: Sequence[BackboneSpec]) -> dict[BackboneSpec, str]:
        """Of what judges see images with; BackboneError if one cannot be loaded."""
        fingerprints: Any = self._next().fingerprints.options(max_task_retries=-1)
        found: list[str] = ray.get(fingerprints.remote(list(backbones)))
        return dict(zip(backbones, found, strict=True))

    def drain(self, timeout_s: float) -> None:
        """Have them drop all calls of trials; a lost one is not waited for any longer."""
        drained: list[ObjectRef[None]] = [actor.drain.remote() for actor in self.actors]
        ray.wait(drained, num_returns=len(drained), timeout=timeout_s)

    def _next(self) -> "ActorHandle[Any]":
        """They take turns at what is done once a category."""
        return self.actors[next(self._turns) % len(self.actors)]


def start_engines(
    backbone: BackboneSpec,
    settings: EngineSettings,
    *,
    live_trials: int | None,
    check: Callable[[], None] = lambda: None,
) -> Engines:
    """Start an engine on every GPU, or on every node where there is none.

    Returns once the first has loaded its backbone; its own error if it cannot.

    Args:
        backbone: What they load.
        settings: How they compute.
        live_trials: How many may run at a time; None is for as many as the cluster has room for.
        check: Called twice a second while they load; may raise.

    Raises:
        SettingsError: None can be placed or started, or it takes minutes.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    gpu_nodes = [node for node in nodes if node["Resources"].get("GPU", 0) >= settings.gpus]
    hosts = gpu_nodes or [node for node in nodes if node["Resources"].get("CPU", 0) > 0]
    if not hosts:
        raise SettingsError("no node of the cluster has a CPU: add one that has")
    are_shared = bool(gpu_nodes) if settings.mode == "auto" else settings.mode == "shared"
    if not are_shared:
        hosts = hosts[:1]
    threads = settings.threads or int(max(node["Resources"].get("CPU", 1) for node in hosts))
    places = [
        node for node in hosts for _ in range(_room(node, "GPU", settings.gpus) if gpu_nodes else 1)
    ]
    live_trials = live_trials or room_for_trials(
        nodes, settings, shared_engines=len(places) if are_shared else 0
    )
    actor: Any = ray.remote(EngineActor)
    actors = tuple(
        actor.options(
            num_cpus=0,
            num_gpus=settings.gpus if gpu_nodes else 0,
            max_restarts=-1,
            max_concurrency=live_trials + 10,  # every live trial may ask, and fits may run
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=True),
        ).remote(backbone, device="cuda" if gpu_nodes else "cpu", threads=threads)
        for node in places
    )
    return Engines(
        actors=actors,
        are_shared=are_shared,
        threads=threads,
        live_trials=live_trials,
        fingerprint=_when_loaded(actors[0].fingerprint.remote(), check),
    )


def room_for_trials(
    nodes: Sequence[Mapping[str, Any]], settings: EngineSettings, *, shared_engines: int
) -> int:
    """How many trials may run at a time on these nodes of Ray: 8 for each engine that they share,
    or as many as have their CPUs."""
    if shared_engines:
        return TRIALS_PER_ENGINE * shared_engines
    return max(1, sum(_room(node, "CPU", settings.threads or 1) for node in nodes))


def _room(node: Mapping[str, Any], resource: str, share: float) -> int:
    """How many find room on a node that want that much of a resource each."""
    return int(node["Resources"].get(resource, 0) / share)


def _when_loaded(fingerprint: "ObjectRef[str]", check: Callable[[], None]) -> str:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while not ray.wait([fingerprint], timeout=0.5)[0]:
        check()
        if time.monotonic() > deadline:
            raise SettingsError(
                f"no engine was ready after {_READY_TIMEOUT_S:.0f} s: see `ray status` for what"
                " the cluster lacks, and Ray's logs for what the engine does"
            )
    try:
        return ray.get(fingerprint)
    except RayActorError as error:
        raise SettingsError(
            f"no engine could be started: {error} (does this machine use the same Ray token as the"
            " cluster?)"
        ) from error


Made = tuple[BankSpec | JudgeSpec, Sequence[Location], BackboneSpec]
"""A spec, the files of its support images, and what encodes them."""


def start_encoding(
    banks: Sequence[Made], judges: Sequence[Made], *, cache: Path | None
) -> "tuple[CategoryBanks, tuple[ObjectRef[int], ...]]":
    """Banks and judges on their way, and small objects that tell when they are there.

    Args:
        banks: those of a category.
        judges: those of a category.
        cache: folder on each node where they are kept; None for none.
    """
    task: Any = _as_task(encode)
    made = [*banks, *judges]
    started = [
        task.remote(spec, support, backbone=backbone, cache=cache)
        for spec, support, backbone in made
    ]
    refs, shots = zip(*started, strict=True)
    digests = [spec.digest for spec, _, _ in made]
    return CategoryBanks(
        specs=tuple(spec for spec, _, _ in banks if isinstance(spec, BankSpec)),
        judges=tuple(spec for spec, _, _ in judges if isinstance(spec, JudgeSpec)),
        refs=dict(zip(digests, refs, strict=True)),
    ), shots


def are_encoded(shots: "Sequence[ObjectRef[int]]") -> bool:
    """Whether the banks that these small objects tell of are there; the error of one that failed
    once none is on its way."""
    _, missing = ray.wait(list(shots), num_returns=len(shots), timeout=0)
    if missing:
        return False
    ray.get(list(shots))
    return True


def _as_task(function: Callable[..., tuple[object, object]]) -> Any:
    """A function that returns a pair, as a Ray task."""
    return ray.remote(num_cpus=1, num_returns=2)(function)


def encode(
    spec: BankSpec | JudgeSpec,
    support: Sequence[Location],
    *,
    backbone: BackboneSpec,
    cache: Path | None,
) -> tuple[SupportBank | Judge, int]:
    """The bank or the judge of a spec and its shots; DataError if an image cannot be read."""
    if isinstance(spec, BankSpec):
        banks = None if cache is None else EncodedCache(cache, SupportBank.restore)
        bank = _encode(spec, support, encode_support, banks, backbone)
        return bank, len(support)
    judges = None if cache is None else EncodedCache(cache, Judge.restore)
    return _encode(spec, support, encode_judge, judges, backbone), len(support)


def _encode(
    spec: SomeSpec,
    support: Sequence[Location],
    make: Callable[[Backbone, Sequence[Image.Image], SomeSpec], Some],
    kept: EncodedCache[SomeSpec, Some] | None,
    backbone: BackboneSpec,
) -> Some:
    encoded = None if kept is None else kept.load(spec)
    if encoded is None:
        reading = find_reading(support, ground=spec.ground, white_level=spec.white_level)
        images = [read_image(path, reading) for path in support]
        with _resident.lent(backbone) as loaded:
            encoded = make(loaded, images, spec)
        if kept is not None:
            kept.save(encoded)
    return encoded


class _Resident:
    """The backbone of a worker process, which encodes many banks; it is let go after a while
    without any, since Ray keeps idle workers."""

    def __init__(self) -> None:
        self._spec: BackboneSpec | None = None
        self._backbone: Backbone | None = None
        self._timer: threading.Timer | None = None

    @contextmanager
    def lent(self, spec: BackboneSpec) -> Iterator[Backbone]:
        """The backbone, loaded unless it is here."""
        if self._timer is not None:
            self._timer.cancel()
        backbone = self._backbone
        if backbone is None or spec != self._spec:
            torch.set_num_threads(1)
            backbone = load_backbone(spec)
        self._spec, self._backbone = spec, backbone
        try:
            yield backbone
        finally:
            self._timer = threading.Timer(_IDLE_S, self._let_go)
            self._timer.daemon = True
            self._timer.start()

    def _let_go(self) -> None:
        self._backbone = None


_resident = _Resident()
