"""What a search will take, before it starts: counted, and timed on the spot with one category."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TypeVar

import torch

from apt_ray.anomalies.bank import SupportBank, encode_support
from apt_ray.config import BackboneSpec
from apt_ray.data.folders import Category
from apt_ray.errors import DataError
from apt_ray.features.clip import load_backbone
from apt_ray.features.protocol import Backbone
from apt_ray.images import find_reading, read_image
from apt_ray.prompts.fit import fit
from apt_ray.tables import align
from apt_ray.text import duration
from apt_ray.validation.judge import Judge, encode_judge
from tuning.actors import TRIALS_PER_ENGINE
from tuning.calls import RungCall
from tuning.engine import Engine, EngineLimits
from tuning.settings import RUNGS, EngineSettings, SearchSettings
from tuning.space import starting_point

_ASHA_SHARE = (1 + 1 / 2 + 2 * 1 / 4) / RUNGS
"""Of the steps of all trials, where the worse half stops after 1/RUNGS and again after 2/RUNGS."""

Made = TypeVar("Made")

_FEW, _MANY = 4, 20
"""Steps of two trials, whose times differ by those of the steps alone."""

_ROUNDS = 5
"""How often both are timed at the most, where other work hides what the steps take."""

_LEASE_S = 600.0
_MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Machines:
    """Where a search is to run: CPUs and GPUs of all nodes, and what to call them."""

    cpus: int
    gpus: int
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a search will take. Seconds are of one CPU, or of one GPU where there are any.

    Attributes:
        categories: How many are searched.
        banks: Support banks that are encoded.
        judges: Judges that are encoded.
        encoded_mib: Of all these, in the object store and in the cache.
        trials: Of all categories.
        lanes: Prompt sets that a trial trains side by side.
        workers: How many trials, or engines, compute at a time.
        encoding_s: Seconds for all banks and judges, on CPUs.
        training_s: For the steps of all trials, if none were stopped.
        judging_s: For their validation values, likewise.
        share: What the scheduler leaves of both, at the least.
        fitting_s: For the winners.
        machines: Where it is to run.
    """

    categories: int
    banks: int
    judges: int
    encoded_mib: float
    trials: int
    lanes: int
    workers: int
    encoding_s: float
    training_s: float
    judging_s: float
    share: float
    fitting_s: float
    machines: Machines

    def clock_s(self, share: float) -> float:
        """Seconds by the clock, if this share of training and judging is done."""
        trials = share * (self.training_s + self.judging_s) + self.fitting_s
        return self.encoding_s / self.machines.cpus + trials / self.workers

    def summary(self) -> dict[str, object]:
        """What it comes to, for programs."""
        computing_s = self.training_s + self.judging_s + self.fitting_s
        on_gpus = self.machines.gpus > 0
        return {
            "least_s": self.clock_s(self.share),
            "most_s": self.clock_s(1.0),
            "cpu_s": self.encoding_s + (0.0 if on_gpus else computing_s),
            "gpu_s": computing_s if on_gpus else 0.0,
            "cpus": self.machines.cpus,
            "gpus": self.machines.gpus,
            "encoded_mib": self.encoded_mib,
        }

    def __str__(self) -> str:
        of = "GPU" if self.machines.gpus else "CPU"
        low, high = (duration(self.clock_s(share)) for share in (self.share, 1.0))
        rows = [
            ("machines", self.machines.name),
            ("categories", f"{self.categories}"),
            ("encoded once", f"{self.banks} support banks and {self.judges} judges"),
            ("", f"{duration(self.encoding_s)} of one CPU, {self.encoded_mib:,.0f} MiB"),
            ("trials", f"{self.trials} of {self.lanes} lanes, {self.workers} compute at a time"),
            ("", f"{duration(self.training_s)} of one {of} to train, if none were stopped"),
            ("", f"{duration(self.judging_s)} of one {of} to judge"),
            ("winners", f"{duration(self.fitting_s)} of one {of} to fit"),
            ("by the clock", low if low == high else f"{low} to {high}"),
        ]
        return align(rows)


def estimate(
    categories: Sequence[Category],
    settings: SearchSettings,
    engine: EngineSettings,
    machines: Machines,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Estimate:
    """Count a search, and time its parts on this machine with the first category.

    Args:
        categories: What is searched.
        settings: How.
        engine: Where the arithmetic is to be done.
        machines: Of the cluster.
        say: Told what is timed.

    Raises:
        AptError: The category has too few images, one cannot be read, or an encoder not be loaded.
    """
    shared = engine.mode == "shared" or (engine.mode == "auto" and machines.gpus > 0)
    device = "cuda" if machines.gpus and torch.cuda.is_available() else "cpu"
    cpus = machines.cpus
    load = partial(load_backbone, device=device)
    torch.set_num_threads(1)

    first = categories[0]
    support = first.support_set(settings.shots, settings.support_seeds[0])
    reading = find_reading(support, ground=settings.ground, white_level=settings.white_level)
    images = [read_image(path, reading) for path in support]
    single = settings.model_copy(update={"support_seeds": settings.support_seeds[:1]})
    backbone = load(settings.backbone)

    say(f"timing a support bank of {first.name}")
    bank_specs = single.bank_specs([support], fingerprint=backbone.fingerprint)
    bank_s, bank = _timed(lambda: encode_support(backbone, images, bank_specs[0][0]))
    judges: dict[BackboneSpec, Judge] = {}
    judging_s: list[float] = []
    judge_mib: list[float] = []
    for number, spec in enumerate(seen := settings.judging(), 1):
        say(f"timing judge {number} of {len(seen)}")
        encoder = load(spec)
        specs = single.judge_specs([support], fingerprint=encoder.fingerprint)
        seconds, judges[spec] = _timed(partial(encode_judge, encoder, images, specs[0][0]))
        judging_s += [seconds] * len(specs)
        judge_mib += [judges[spec].nbytes / _MIB] * len(specs)
    say("timing trials")
    step_s, value_s = _time_trials(
        backbone, bank, judges, settings, at_a_time=TRIALS_PER_ENGINE if shared else 1
    )
    say("timing a winner's fit")
    fit_s, _ = _timed(
        lambda: fit(first.name, support, settings.fit_settings(), backbone=backbone, bank=bank)
    )
    sets, trials = len(categories) * len(settings.support_seeds), len(categories) * settings.trials
    return Estimate(
        categories=len(categories),
        banks=sets * len(bank_specs),
        judges=sets * len(judge_mib),
        encoded_mib=sets * (len(bank_specs) * bank.nbytes / _MIB + sum(judge_mib)),
        trials=trials,
        lanes=bank.shots * len(settings.support_seeds),
        workers=max(1, machines.gpus if shared else min(settings.live_trials or cpus, cpus)),
        encoding_s=sets * (len(bank_specs) * bank_s + sum(judging_s)),
        training_s=trials * settings.steps * step_s,
        judging_s=trials * RUNGS * value_s,
        share=_ASHA_SHARE if settings.scheduler == "asha" else 1.0,
        fitting_s=len(categories) * fit_s,
        machines=machines,
    )


def _time_trials(
    backbone: Backbone,
    bank: SupportBank,
    judges: Mapping[BackboneSpec, Judge],
    settings: SearchSettings,
    *,
    at_a_time: int,
) -> tuple[float, float]:
    """Seconds of a trial's step, and of its validation value, where so many trials share them."""
    point = starting_point(settings.space, settings.backbone)
    seen, layers = settings.judged_by(point)
    encoded: dict[str, SupportBank | Judge] = {"bank": bank, "judge": judges[seen]}
    engine = Engine(backbone, encoded.__getitem__, limits=EngineLimits(lease_s=_LEASE_S), threads=1)
    seeds = len(settings.support_seeds)

    numbers = count()  # a call that is known already would not be computed again

    def run(steps: int) -> None:
        calls = [
            RungCall(
                id=str(next(numbers)),
                banks=("bank",) * seeds,
                judges=("judge",) * seeds,
                layers=layers,
                settings=settings.fit_settings(point).model_dump(),
                steps=steps,
                state=None,
            )
            for _ in range(at_a_time)
        ]
        for call in calls:
            engine.submit(call)
        for call in calls:
            result = engine.collect(call.id, _LEASE_S)
            engine.forget(call.id)
            if result is None or result.error:
                raise DataError(f"a trial cannot be timed: {result and result.error}")

    few, many = min(_FEW, settings.steps - 1), min(_MANY, settings.steps)
    try:
        run(1)  # what is loaded or made once
        few_s = many_s = math.inf
        for _ in range(_ROUNDS):
            few_s = min(few_s, _timed(lambda: run(few))[0])
            many_s = min(many_s, _timed(lambda: run(many))[0])
            if many_s > few_s:
                break
    finally:
        engine.close()
    step_s = max(0.0, many_s - few_s) / (many - few)
    return step_s / at_a_time, max(0.0, few_s - step_s * few) / at_a_time


def _timed(make: Callable[[], Made]) -> tuple[float, Made]:
    started = time.perf_counter()
    made = make()
    return time.perf_counter() - started, made
