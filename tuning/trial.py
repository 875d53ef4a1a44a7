"""A trial: a light process that asks an engine for one rung after another. No PyTorch here.

What it has reported lies in the search's store before Ray Tune hears of it. A trial that is started
again, because its process or the whole search was killed, repeats the reports and goes on behind
them.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import ray
from ray import ObjectRef, tune
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from apt_ray.config import BackboneSpec
from tuning.banks import CategoryBanks, EncodedRefs
from tuning.calls import EngineBusyError, RungCall, RungResult, UnknownCallError
from tuning.records import SearchStore, TrialRecord
from tuning.settings import RUNGS, SearchSettings

if TYPE_CHECKING:
    from apt_ray.anomalies.bank import SupportBank
    from apt_ray.validation.judge import Judge

_ASK_S = 5.0
_PATIENCE_S = 600.0


class SomeEngine(Protocol):
    """What a trial wants of an engine, near or far; see `tuning.engine.Engine`."""

    def submit(self, call: RungCall) -> None: ...
    def collect(self, call_id: str, timeout_s: float) -> RungResult | None: ...
    def forget(self, call_id: str) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialPlan:
    """What all trials of a search share.

    Attributes:
        store: Where they report.
        settings: Of the search.
        banks: Category -> all banks and judges that its trials may ask for.
        fingerprints: Of all that judges see images with.
        engines: Those that may be asked; without any a trial has one of its own.
        live_trials: How many run at a time.
        threads: PyTorch's threads of an engine of its own.
        began: Time of the search's start, in seconds since the epoch.
    """

    store: SearchStore
    settings: SearchSettings
    banks: Mapping[str, CategoryBanks]
    fingerprints: Mapping[BackboneSpec, str]
    engines: tuple["ActorHandle[Any]", ...]
    live_trials: int
    threads: int
    began: float


def run_trial(config: Mapping[str, Any], *, plan: TrialPlan) -> None:
    """Ask for each rung in turn, and report it; an error of the call ends the trial as failed."""
    category, number = config["category"], config["number"]
    store, settings = plan.store, plan.settings
    record = store.trial(category, number)
    if record is None:
        store.plan()  # says so if this node does not see the storage
        record = TrialRecord(category=category, number=number, settings=config["settings"])
    for rung in range(1, len(record.steps) + 1):
        tune.report(record.report(rung))
    state = store.state(record)
    while not record.has_ended:
        rung = len(record.steps) + 1
        fit_settings = settings.fit_settings(record.settings)
        judged_by, layers = settings.judged_by(record.settings)
        encoded = plan.banks[category]
        banks = encoded.of(fit_settings)
        judges = encoded.judging(fit_settings, plan.fingerprints[judged_by])
        call = RungCall(
            id=f"{store.name}/{category}/{number}/{rung}",
            banks=tuple(banks),
            judges=tuple(judges),
            layers=layers,
            settings=fit_settings.model_dump(),
            steps=settings.rung_steps(rung),
            state=state,
        )
        result = _ask(_engines(plan, {**banks, **judges}, number), call)
        state = result.state
        elapsed = time.time() - plan.began
        record = record.reported(result, elapsed, is_last=rung == RUNGS)
        store.save_trial(record, state)
        if result.error is None:
            tune.report(record.report(rung))


def _ask(engines: Sequence[SomeEngine], call: RungCall) -> RungResult:
    """The result of a call, from the first engine that serves it; lost ones are asked again."""
    deadline = time.monotonic() + _PATIENCE_S
    attempt = 0
    while True:
        engine = engines[attempt % len(engines)]
        attempt += 1
        try:
            engine.submit(call)
            while True:
                result = engine.collect(call.id, _ASK_S)
                if result is not None:
                    engine.forget(call.id)
                    return result
                deadline = time.monotonic() + _PATIENCE_S
        except (EngineBusyError, UnknownCallError, RayActorError) as error:
            if time.monotonic() > deadline:
                return RungResult(
                    error=f"no engine served the trial for {_PATIENCE_S:.0f} s ({error}): look at"
                    " Ray's logs, then --resume the search",
                )
            time.sleep(min(2.0, 0.1 * 2 ** min(attempt, 10)))


def _engines(plan: TrialPlan, encoded: EncodedRefs, number: int) -> list[SomeEngine]:
    """All engines that a trial may ask, its first choice first."""
    if not plan.engines:
        return [_OwnEngine(plan.settings.backbone, encoded, plan.threads)]
    first = number % len(plan.engines)
    return [_RemoteEngine(actor, encoded) for actor in plan.engines[first:] + plan.engines[:first]]


class _RemoteEngine:
    """An engine in an actor."""

    def __init__(self, actor: "ActorHandle[Any]", encoded: EncodedRefs) -> None:
        self._actor, self._encoded = actor, encoded

    def submit(self, call: RungCall) -> None:
        ray.get(self._actor.submit.remote(call, dict(self._encoded)))

    def collect(self, call_id: str, timeout_s: float) -> RungResult | None:
        answer: Any = self._actor.collect.remote(call_id, timeout_s)
        result: RungResult | None = ray.get(answer)
        return result

    def forget(self, call_id: str) -> None:
        self._actor.forget.remote(call_id)


class _OwnEngine:
    """An engine in this process, which then does import PyTorch."""

    def __init__(self, backbone: BackboneSpec, encoded: EncodedRefs, threads: int) -> None:
        self._engine, self._refs = _engine_of_this_process(backbone, threads)
        self._encoded = encoded

    def submit(self, call: RungCall) -> None:
        self._refs.update(self._encoded)
        self._engine.submit(call)

    def collect(self, call_id: str, timeout_s: float) -> RungResult | None:
        return self._engine.collect(call_id, timeout_s)

    def forget(self, call_id: str) -> None:
        self._engine.forget(call_id)


@lru_cache(maxsize=1)
def _engine_of_this_process(
    backbone: BackboneSpec, threads: int
) -> "tuple[SomeEngine, dict[str, ObjectRef[SupportBank | Judge]]]":
    from apt_ray.features.clip import load_backbone
    from tuning.engine import Engine

    refs: dict[str, ObjectRef[SupportBank | Judge]] = {}
    model = load_backbone(backbone)
    model.drop_vision()  # images are encoded elsewhere
    engine = Engine(
        model,
        lambda digest: ray.get(refs[digest]),
        threads=threads,
    )
    return engine, refs
