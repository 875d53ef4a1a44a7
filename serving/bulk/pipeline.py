"""A batch on Ray Data: decoders, actors that hold the model, and writers, one block after another.

Blocks stream: a stage is held back while those behind it have enough to do, so that memory does not
grow with the number of images.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources

from apt_ray.errors import AptError, SettingsError, WriteError
from apt_ray.text import duration
from serving.bulk.inputs import Input, to_table
from serving.bulk.results import Output, Tallies, add_tallies, whole
from serving.bulk.stages import (
    TO_DO,
    Attempts,
    Batch,
    Decoder,
    Model,
    Overlays,
    Verdicts,
    Writer,
    read_tallies,
)
from serving.bulk.versions import Version
from serving.settings import Runtime

# Of a processor that a thread of the model is given; the rest is for the decoders beside it.
_MODEL_SHARE = 0.75
_DECODER_CPUS = 0.25
# Blocks that are given up and left to the next run; with more of them the run ends.
_LOST_BLOCKS = 10
_SECONDS_BETWEEN_LINES = 15.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What a batch takes of a cluster.

    Attributes:
        actors: that hold the model.
        threads: of each.
        gpus: of each.
        decoders, writers: processes of the stages before and behind the model.
        batch_size: images of one forward pass.
        block_images: images of a block, at most.
        runtime: that encodes images on CPUs.
    """

    actors: int
    threads: int
    gpus: float
    decoders: int
    writers: int
    batch_size: int
    block_images: int
    runtime: Runtime

    @property
    def actor_cpus(self) -> float:
        return 1.0 if self.gpus else self.threads * _MODEL_SHARE

    @property
    def decoder_cpus(self) -> float:
        return 1.0 if self.gpus else _DECODER_CPUS


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a user says of `Resources`; None is up to the cluster."""

    actors: int | None = None
    threads: int | None = None
    gpus: float | None = None
    batch_size: int | None = None
    block_images: int = 256
    runtime: Runtime = "auto"

    def of_cluster(self) -> Resources:
        """What is taken of the cluster that this process is connected to.

        Raises SettingsError if no node has an actor's share free, unless their number is given.
        """
        # Ray has no public name for what is free on each node.
        nodes = list(ray._private.state.available_resources_per_node().values())  # type: ignore[no-untyped-call]
        gpus = self.gpus
        if gpus is None:
            gpus = 1.0 if any(node.get("GPU", 0) for node in nodes) else 0.0
        decoder_cpus = 1.0 if gpus else _DECODER_CPUS
        free = [node.get("CPU", 0) for node in nodes]
        # A decoder must find room beside an actor.
        most = max([*free, 0]) - decoder_cpus
        threads = self.threads or (1 if gpus else min(4, max(1, int(most / _MODEL_SHARE))))
        cpus = 1.0 if gpus else threads * _MODEL_SHARE
        actors = self.actors or min(
            _fitting(nodes, cpus, gpus),
            int((sum(free) - decoder_cpus) / cpus),
        )
        if actors < 1:
            wanted = f"{cpus + decoder_cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
            raise SettingsError(
                f"no node of the cluster has {wanted} free for an actor and a decoder:"
                f" ask for less with --cpus-per-actor or --gpus-per-actor, wait until others are"
                f" done, or say --actors N where an autoscaler brings nodes"
            )
        decoders = max(1, int((sum(free) - actors * cpus) / decoder_cpus))
        return Resources(
            actors=actors,
            threads=threads,
            gpus=gpus,
            decoders=decoders,
            writers=max(1, decoders // 4),
            batch_size=self.batch_size or (64 if gpus else 8),
            block_images=self.block_images,
            runtime=self.runtime,
        )


def _fitting(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: float) -> int:
    """How many actors nodes hold."""
    on_gpus = [int(node.get("GPU", 0) / gpus + 1e-9) if gpus else math.inf for node in nodes]
    return sum(
        int(min(node.get("CPU", 0) // cpus, most))
        for node, most in zip(nodes, on_gpus, strict=True)
    )


@dataclass(kw_only=True, slots=True)
class Run:
    """What one run did.

    Attributes:
        images: that have a row now and had none before.
        seconds: of the whole run, the start of its processes included.
        ended: of each block that ended, when (of `time.monotonic`) and the images by then; the
            first and the last.
        stage_s: seconds of work by stage, over all processes.
        slots: how many work at once, by stage.
        lost: inputs of blocks that were given up, because their processes died again and again.
        tallies: over the images.
    """

    images: int = 0
    seconds: float = 0.0
    ended: list[tuple[float, int]] = field(default_factory=list)
    stage_s: dict[str, float] = field(
        default_factory=lambda: {"decode": 0.0, "model": 0.0, "conclude": 0.0}
    )
    slots: dict[str, int] = field(default_factory=dict)
    lost: list[Input] = field(default_factory=list)
    tallies: Tallies = field(default_factory=dict)

    @property
    def busy(self) -> dict[str, float]:
        """The share of the time in which a stage's processes work, by stage."""
        return {
            stage: seconds / max(1e-9, self.seconds * self.slots[stage])
            for stage, seconds in self.stage_s.items()
        }

    @property
    def steady_rate(self) -> float | None:
        """Images a second once blocks come; None until there are two."""
        if len(self.ended) < 2:
            return None
        (began, first), (now, images) = self.ended
        return (images - first) / max(1e-9, now - began)

    @property
    def slowest(self) -> str:
        """The stage that all others wait for."""
        busy = self.busy
        return max(busy, key=lambda stage: busy[stage])


def cut(
    inputs: Sequence[Input], versions: Mapping[str, Version], most: int
) -> list[tuple[int, int, int]]:
    """Blocks of inputs that are sorted: (start, stop, input size of the backbone).

    A block has one backbone. What is left when some blocks are finished is cut as it was.
    """
    blocks: list[tuple[int, int, int]] = []
    start = 0
    for place in range(1, len(inputs) + 1):
        first = versions[inputs[start].category]
        if place < len(inputs) and place - start < most:
            if inputs[place].category == inputs[place - 1].category:
                continue
            after = versions[inputs[place].category]
            if after.prompt_set.fingerprint == first.prompt_set.fingerprint:
                continue
        blocks.append((start, place, first.input_size))
        start = place
    return blocks


def inspect_all(
    inputs: Sequence[Input],
    versions: Mapping[str, Version],
    output: Output,
    resources: Resources,
    *,
    overlays: Overlays = "none",
    say: Callable[[str], None] = print,
) -> Run:
    """Inspect images on the Ray that this process is connected to, and write their rows.

    Args:
        inputs: sorted, each once.
        versions: by category.
        output: where to.
        resources: of the cluster.
        overlays: of which images.
        say: takes a line of progress now and then.

    Raises:
        WriteError: a block cannot be written; those before it are.
        AptError: too many blocks were lost, or the actors cannot begin.
    """
    blocks = cut(inputs, versions, resources.block_images)
    # More of them than there are blocks would have nothing to do.
    resources = replace(
        resources,
        actors=min(resources.actors, len(blocks)),
        decoders=min(resources.decoders, len(blocks)),
        writers=min(resources.writers, len(blocks)),
    )
    batch = Batch(
        inputs=ray.put(to_table(inputs)),
        verdicts={category: Verdicts.of(version) for category, version in versions.items()},
        output=output,
        overlays=overlays,
        # Its node may be lost as any other: who asks meanwhile waits for it, and it counts anew.
        attempts=ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote(),
    )
    pixels = max(size for _, _, size in blocks) ** 2 * 3 * resources.block_images
    _settle_context(resources, pixels)
    done = (
        ray.data.from_arrow([_row(block) for block in blocks])
        .map_batches(
            Decoder,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_kwargs={"batch": batch},
            compute=ActorPoolStrategy(size=resources.decoders),
            num_cpus=resources.decoder_cpus,
        )
        .map_batches(
            Model,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_kwargs={
                "batch": batch,
                "versions": ray.put(dict(versions)),
                "batch_size": resources.batch_size,
                "threads": resources.threads,
                "device": "cuda" if resources.gpus else "cpu",
                "runtime": resources.runtime,
            },
            compute=ActorPoolStrategy(size=resources.actors),
            num_cpus=resources.actor_cpus,
            num_gpus=resources.gpus,
        )
        .map_batches(
            Writer,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_kwargs={"batch": batch},
            compute=ActorPoolStrategy(size=resources.writers),
            # They do next to nothing, and must find room elsewhere when their node is lost, though
            # what is left of the cluster is full.
            num_cpus=0,
        )
    )
    given_up = 0
    run = Run(
        slots={
            "decode": resources.decoders,
            "model": resources.actors,
            "conclude": resources.writers,
        }
    )
    left = {start: stop for start, stop, _ in blocks}
    with _Progress(len(inputs), run, say):
        try:
            for table in done.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            ):
                assert isinstance(table, pa.Table)
                for row in table.to_pylist():
                    given_up += row["given_up"]
                    if given_up > _LOST_BLOCKS:
                        raise AptError(
                            f"the processes of {given_up} blocks died again and again, after"
                            f" {run.images:,} images: see Ray's logs for why, memory maybe; then"
                            f" run the same command again to go on"
                        )
                    if not row["given_up"]:
                        _count(row, run, left)
        except ray.exceptions.RayError as error:
            raise AptError(
                f"the batch ended early, after {run.images:,} images: {_reason(error)}; run the"
                f" same command again to go on"
            ) from error
    run.lost = [each for start, stop in left.items() for each in inputs[start:stop]]
    return run


def _count(row: dict[str, object], run: Run, left: dict[int, int]) -> None:
    if row["failure"] is not None:
        raise WriteError(
            f"{row['failure']}; the {run.images:,} images before are kept: run the same command"
            f" again to go on"
        )
    start = row["start"]
    assert isinstance(start, int)
    stop = left.pop(start, None)
    if stop is None:
        return
    run.images += stop - start
    run.ended = [*run.ended[:1], (time.monotonic(), run.images)]
    add_tallies(run.tallies, read_tallies(str(row["tallies"])))
    for stage in run.stage_s:
        run.stage_s[stage] += float(str(row[f"{stage}_s"]))


def _settle_context(resources: Resources, pixels: int) -> None:
    """Keep Ray Data quiet, and what waits between its stages in bounds."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = None
    waiting = 2 * resources.decoders + 3 * resources.actors + 2
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=max(2**28, waiting * pixels)
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _row(block: tuple[int, int, int]) -> pa.Table:
    return pa.table(
        [pa.array([value], kind.type) for value, kind in zip(block, TO_DO, strict=True)],
        schema=TO_DO,
    )


def _reason(error: Exception) -> str:
    """The last line of what Ray says of the first error, which is the error itself.

    Ray Data raises another because of it, whose last line speaks of its own settings.
    """
    first, _, _ = str(error).partition("\nThe above exception was the direct cause")
    lines = [line.strip() for line in first.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class _Progress:
    """Says a line now and then while entered, also while no block ends.

    Args:
        total: images to inspect.
        run: as it grows.
        say: takes the lines.
    """

    def __init__(self, total: int, run: Run, say: Callable[[str], None]) -> None:
        self._total, self._run, self._say = total, run, say
        self._end = threading.Event()

    def __enter__(self) -> None:
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        self._run.seconds = time.monotonic() - self._started
        self._say(self._line())

    def _tick(self) -> None:
        while not self._end.wait(_SECONDS_BETWEEN_LINES):
            self._say(self._line())

    def _line(self) -> str:
        seconds = time.monotonic() - self._started
        run, total = self._run, whole(dict(self._run.tallies))
        share = run.images / self._total
        if not run.images:
            return f"0 of {self._total:,} images after {seconds:.0f} s: no block is done yet"
        rate = run.steady_rate or run.images / seconds
        left = (self._total - run.images) / rate
        return (
            f"{run.images:,} of {self._total:,} images ({share:.0%}), {rate:.1f}/s,"
            f" {total.rejected:,} rejected, {total.unreadable:,} unreadable"
            + (f", {duration(left)} left" if left >= 1 else "")
        )
