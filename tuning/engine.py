"""The engine: trains the lanes of all live trials in one continuous batch. It knows no Ray.

Calls join between two steps, each at its own step of its own schedule, and leave when they have
reached theirs, as requests do in an inference server. One thread of the engine's own does all the
arithmetic; any number of threads may submit and collect.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from safetensors.torch import load, save

from apt_ray.anomalies.bank import SupportBank
from apt_ray.config import FitSettings
from apt_ray.errors import AptError, SettingsError
from apt_ray.features.protocol import Backbone
from apt_ray.prompts.lanes import Lane, LaneState, folds
from apt_ray.prompts.trainer import PromptTrainer
from apt_ray.validation.judge import Judge
from apt_ray.validation.synthetic import judge_folds
from tuning.calls import EngineBusyError, RungCall, RungResult, UnknownCallError

LoadEncoded = Callable[[str], SupportBank | Judge]
"""The bank or the judge whose spec has a digest."""

Held = TypeVar("Held", SupportBank, Judge)

_MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLimits:
    """What one engine may hold at a time.

    Attributes:
        lanes: Lanes in training; a call that does not fit waits for others to leave.
        calls: Calls in training, waiting or not yet collected; further ones are refused.
        bank_mib: Banks and judges in MiB; those used least recently make room.
        lease_s: A call whose caller has not asked for this long is dropped.
    """

    lanes: int = 1024
    calls: int = 256
    bank_mib: int = 4096
    lease_s: float = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStatus:
    """A glance at an engine.

    Attributes:
        training: Lanes in the batch.
        waiting: Calls that wait for room.
        lane_steps: Steps done since the start, summed over lanes.
    """

    training: int
    waiting: int
    lane_steps: int


@dataclass(eq=False, kw_only=True, slots=True)
class _Slot:
    """A call in the engine."""

    call: RungCall
    asked_for: float
    done: threading.Event = field(default_factory=threading.Event)
    lanes: tuple[Lane, ...] = ()
    steps_left: int = 0
    result: RungResult | None = None


class Engine:
    """Serves RungCalls on one backbone.

    Args:
        backbone: The frozen model, on the device that computes.
        load: Called from the engine's thread for a bank or a judge that it does not hold;
            an AptError from it is the result of the calls that needed them.
        limits: What the engine may hold.
        threads: PyTorch's threads on a CPU; None leaves PyTorch's own choice. It is a setting of
            the whole process.
    """

    def __init__(
        self,
        backbone: Backbone,
        load: LoadEncoded,
        *,
        limits: EngineLimits | None = None,
        threads: int | None = None,
    ) -> None:
        self._threads = threads
        self.backbone = backbone
        self._limits = limits or EngineLimits()
        self._load = load
        self._held: OrderedDict[str, SupportBank | Judge] = OrderedDict()
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._trainer = PromptTrainer(backbone)
        self._training: list[_Slot] = []
        self._lane_steps = 0
        self._changed = threading.Condition()
        self._is_closed = False
        self._is_draining = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, call: RungCall) -> None:
        """Take a call in; one that is already here keeps its place.

        Raises:
            EngineBusyError: The engine holds as many calls as it may.
        """
        with self._changed:
            if call.id in self._slots:
                self._slots[call.id].asked_for = time.monotonic()
                return
            if self._is_draining:
                raise EngineBusyError("the search is being stopped, the engine takes no more calls")
            if len(self._slots) >= self._limits.calls:
                raise EngineBusyError(
                    f"the engine holds {len(self._slots)} calls, its limit: call again later, or"
                    f" lower the number of live trials"
                )
            self._slots[call.id] = _Slot(call=call, asked_for=time.monotonic())
            self._changed.notify_all()

    def collect(self, call_id: str, timeout_s: float) -> RungResult | None:
        """The result of a call, or None if there is none after `timeout_s`; renews its lease.

        A result can be collected again until its lease ends.

        Raises:
            UnknownCallError: There is no such call (any more).
        """
        with self._changed:
            slot = self._slots.get(call_id)
            if slot is None:
                raise UnknownCallError(call_id)
            slot.asked_for = time.monotonic()
        slot.done.wait(timeout_s)
        slot.asked_for = time.monotonic()
        return slot.result

    def forget(self, call_id: str) -> None:
        """Drop a call, whatever has become of it; its lanes leave after the present step."""
        with self._changed:
            self._slots.pop(call_id, None)

    def bank(self, digest: str) -> SupportBank:
        """The bank whose spec has this digest, on the backbone's device."""
        return self._get(digest, SupportBank)

    def _get(self, digest: str, kind: type[Held]) -> Held:
        with self._changed:
            held = self._held.get(digest)
            if held is not None:
                self._held.move_to_end(digest)
        if held is None:
            held = self._load(digest).to(self.backbone.device)
            with self._changed:
                self._held[digest] = held
                while len(self._held) > 1 and self._held_mib() > self._limits.bank_mib:
                    self._held.popitem(last=False)
        if not isinstance(held, kind):
            raise TypeError(f"{digest} is a {type(held).__name__}, not a {kind.__name__}")
        return held

    def drain(self) -> None:
        """Drop all calls and refuse further ones, so that the machine is free for other work."""
        with self._changed:
            self._is_draining = True
            self._slots.clear()

    def status(self) -> EngineStatus:
        """What the engine is doing."""
        with self._changed:
            waiting = sum(1 for slot in self._slots.values() if not slot.lanes and not slot.result)
            return EngineStatus(
                training=len(self._trainer.lanes),
                waiting=waiting,
                lane_steps=self._lane_steps,
            )

    def close(self) -> None:
        """End the engine's thread after the present step."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        while True:
            with self._changed:
                while not (self._is_closed or self._training or self._next_waiting()):
                    self._changed.wait(1.0)
                    self._expire()
                if self._is_closed:
                    return
                self._expire()
            self._drop_forgotten()
            self._admit()
            if self._training:
                self._step()

    def _expire(self) -> None:
        oldest = time.monotonic() - self._limits.lease_s
        for call_id in [key for key, slot in self._slots.items() if slot.asked_for < oldest]:
            del self._slots[call_id]

    def _next_waiting(self) -> _Slot | None:
        return next(
            (slot for slot in self._slots.values() if not slot.lanes and slot.result is None), None
        )

    def _drop_forgotten(self) -> None:
        with self._changed:
            gone = [slot for slot in self._training if self._slots.get(slot.call.id) is not slot]
        for slot in gone:
            self._trainer.leave(slot.lanes)
            self._training.remove(slot)

    def _admit(self) -> None:
        """Let calls join in the order in which they came, while there is room."""
        while True:
            with self._changed:
                slot = self._next_waiting()
            if slot is None:
                return
            try:
                banks = [self.bank(digest) for digest in slot.call.banks]
                if self._training and not self._fits(sum(bank.shots for bank in banks)):
                    return
                self._join(slot, banks)
            except Exception as error:  # one call's trouble is not to end the others
                self._settle(slot, RungResult(error=_reason(error)))

    def _fits(self, lanes: int) -> bool:
        return len(self._trainer.lanes) + lanes <= self._limits.lanes

    def _join(self, slot: _Slot, banks: Sequence[SupportBank]) -> None:
        settings = FitSettings.parse(slot.call.settings)
        lanes = tuple(folds(banks, settings))
        states = None if slot.call.state is None else unpack(slot.call.state, lanes)
        done = states[0].steps_done if states else 0
        if not done < slot.call.steps <= settings.steps:
            raise SettingsError(
                f"a call to step {slot.call.steps} of {settings.steps} cannot go on from {done}"
            )
        self._trainer.join(lanes, states)
        slot.lanes = lanes
        slot.steps_left = slot.call.steps - done
        self._training.append(slot)

    def _step(self) -> None:
        """One step of every lane; then the calls that have come to their end leave."""
        try:
            self._trainer.advance(1)
        except Exception as error:  # out of memory, most likely: say so to every caller
            for slot in self._training:
                reason = f"the engine failed in training: {type(error).__name__}: {error}"
                self._settle(slot, RungResult(error=reason))
            self._training, self._trainer = [], PromptTrainer(self.backbone)
            return
        self._lane_steps += len(self._trainer.lanes)
        for slot in self._training:
            slot.steps_left -= 1
        ended = [slot for slot in self._training if slot.steps_left == 0]
        for slot in ended:
            self._finish(slot)

    def _finish(self, slot: _Slot) -> None:
        text_TPE = self._trainer.text_features(slot.lanes)
        lanes, call = slot.lanes, slot.call
        states = self._trainer.leave(lanes)
        self._training.remove(slot)
        try:
            judges = [self._get(digest, Judge) for digest in call.judges]
            value = judge_folds(self.backbone, lanes, text_TPE, judges, call.layers)
        except Exception as error:  # one call's trouble is not to end the others
            self._settle(slot, RungResult(error=_reason(error)))
            return
        self._settle(
            slot,
            RungResult(
                state=pack(states),
                steps=call.steps,
                validation=value.value,
                validation_sd=value.sd,
                patch=value.patch,
                families=value.families,
                images=value.images,
            ),
        )

    def _settle(self, slot: _Slot, result: RungResult) -> None:
        slot.result = result
        slot.lanes = ()
        slot.done.set()

    def _held_mib(self) -> float:
        return sum(held.nbytes for held in self._held.values()) / _MIB


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, AptError) else f"{type(error).__name__}: {error}"


def pack(states: Sequence[LaneState]) -> bytes:
    """The states of a trial's lanes, which are equally long, as safetensors."""
    tensors = {
        name: torch.stack([getattr(state, name) for state in states])
        for name in ("contexts_PLC", "velocity_PLC", "meta_2E", "norm", "generator")
    }
    tensors["steps_done"] = torch.tensor([state.steps_done for state in states])
    return save(tensors)


def unpack(data: bytes, lanes: Sequence[Lane]) -> list[LaneState]:
    """The states of `lanes`; SettingsError if they do not belong to them."""
    tensors = load(data)
    steps_done = tensors.pop("steps_done").tolist()
    lengths = {lane.settings.context_length for lane in lanes}
    if len(steps_done) != len(lanes) or {tensors["contexts_PLC"].shape[2]} != lengths:
        raise SettingsError("the state of a trial does not fit its settings: search again")
    return [
        LaneState(**{name: rows[i] for name, rows in tensors.items()}, steps_done=steps_done[i])
        for i in range(len(lanes))
    ]
