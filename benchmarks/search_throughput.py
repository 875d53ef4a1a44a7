"""A search three ways, and its floors: `python -m benchmarks.search_throughput`.

- ordinary: a Tune trial is a process that loads the backbone, encodes its support sets at its own
  noise strength, and trains one prompt set after another (with truncated texts, as here);
- lanes alone: banks encoded once, a trial trains its seeds and folds as lanes of one batch, in a
  process with a backbone of its own (`--engine own`, the default on CPUs);
- lanes and engine: all live trials in one batch (`--engine shared`, the default on GPUs).

Each is measured by the clock and by the processor seconds of all its processes; the latter say what
it costs on a machine that has other work too, and are the floor of the former.

The floors are Ray Tune with trials that do nothing, the trainer and the encoding of the banks, both
in a process a core. All start from nothing cached, on a Ray of their own. The ordinary way is
slow: `--ordinary-trials N` runs N of its trials, and its time is scaled to all.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
from ray import tune

from apt_ray.anomalies.bank import SupportBank, encode_support
from apt_ray.anomalies.spec import BankSpec, JudgeSpec, file_digests
from apt_ray.config import NOISE_LADDER, BackboneSpec, FitSettings
from apt_ray.data.folders import Category, find_categories
from apt_ray.data.samples.factory import write_samples
from apt_ray.features.clip import FrozenCLIP, load_backbone
from apt_ray.files import Location
from apt_ray.images import read_image
from apt_ray.prompts.lanes import fold
from apt_ray.prompts.trainer import PromptTrainer
from apt_ray.validation.judge import Judge, encode_judge
from apt_ray.validation.synthetic import judge_folds
from benchmarks.common import CpuMeter, drawn, random_weights
from benchmarks.rows import Row, compared, write_rows
from tuning.actors import start_engines
from tuning.outcome import Outcome
from tuning.progress import say
from tuning.records import SearchPlan, SearchStore
from tuning.results import best_trial
from tuning.runner import encode_categories, run_trials
from tuning.searcher import CategoriesSearcher
from tuning.settings import RUNGS, EngineSettings, SearchSettings
from tuning.trial import TrialPlan

_CATEGORY = "washer"
_WAYS = ("Tune", "encoding", "trainer", "engine", "asha", "lanes", "ordinary")


def main() -> None:
    """Run every way once, one after another, and print their times and ratios."""
    options = _parser().parse_args()
    with TemporaryDirectory(prefix="apt-ray-bench-") as name:
        folder = Path(name)
        write_samples(folder / "data")
        (category,) = find_categories(folder / "data", [_CATEGORY])
        settings = SearchSettings.parse(
            {
                "shots": options.shots,
                "support_seeds": tuple(range(options.seeds)),
                "trials": options.trials,
                "live_trials": options.live_trials,
                "scheduler": "none",
                "steps": options.steps,
                "backbone": random_weights(options.backbone, folder),
            }
        )
        seconds, values = _measure(options, settings, category, folder)
    rows = [
        row
        for suffix, unit in (("", "s"), (" CPU", "CPU s"))
        for row in _rows({name: seconds[name + suffix] for name in _WAYS}, unit)
    ]
    rows.append(
        compared(
            "best validation value, engine against lanes alone",
            *values,
            "AUROC",
            more_is_better=True,
        )
    )
    write_rows(rows, options.json)


def _measure(
    options: argparse.Namespace, settings: SearchSettings, category: Category, folder: Path
) -> tuple[dict[str, float], tuple[float, float]]:
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        ray.init(address="local", num_cpus=options.threads, include_dashboard=False)
        started = time.perf_counter()
        try:
            with CpuMeter() as meter:
                return function()
        finally:
            seconds[name] = time.perf_counter() - started
            seconds[f"{name} CPU"] = meter.seconds
            say(f"{name}: {seconds[name]:.1f} s, {meter.seconds:.1f} CPU s")
            ray.shutdown()

    def search(mode: str, scheduler: str = "none") -> float:
        planned = settings.model_copy(update={"scheduler": scheduler})
        return _search(options, planned, mode, category, folder / f"{mode}-{scheduler}")

    timed("Tune", lambda: _idle(settings, folder / "idle"))
    seconds |= _arithmetic(options, settings, category)
    say(f"encoding: {seconds['encoding']:.1f} s, trainer: {seconds['trainer']:.1f} s")
    best_of_lanes = timed("lanes", lambda: search("own"))
    timed("asha", lambda: search("own", "asha"))
    best = timed("engine", lambda: search("shared"))
    timed("ordinary", lambda: _ordinary(options, settings, category, folder / "ordinary"))
    for name in ("ordinary", "ordinary CPU"):
        seconds[name] *= settings.trials / options.ordinary_trials
    return seconds, (best, best_of_lanes)


def _search(
    options: argparse.Namespace,
    settings: SearchSettings,
    mode: str,
    category: Category,
    folder: Path,
) -> float:
    """The trials of a search; the best validation value."""
    store = SearchStore(str(folder), "search")
    store.create(SearchPlan(data="", categories=(category.name,), settings=settings))
    engine = EngineSettings.parse(
        {"mode": mode, "threads": options.engine_threads, "bank_cache": ""}
    )
    engines = start_engines(settings.backbone, engine, live_trials=settings.live_trials)
    fingerprints = engines.fingerprints(settings.judging())
    outcome = Outcome()
    encoding, banks = encode_categories(
        [category], settings, engine, engines.fingerprint, fingerprints, outcome
    )
    plan = TrialPlan(
        store=store,
        settings=settings,
        banks=banks,
        fingerprints=fingerprints,
        engines=engines.actors if engines.are_shared else (),
        live_trials=engines.live_trials,
        threads=options.engine_threads or 1,
        began=time.time(),
    )
    while encoding.is_waiting:
        encoding.poll()
        time.sleep(0.05)
    searcher = CategoriesSearcher(settings, {category.name: []}, encoding.state)
    run_trials(plan, searcher, trials=settings.trials)
    return best_trial(store.trials(category.name)).validation[-1]


def _idle(settings: SearchSettings, folder: Path) -> None:
    """Ray Tune's own cost: as many trials and reports, and nothing in them."""
    _tune(_do_nothing, [{}] * settings.trials, settings.live_trials, 0.01, folder, is_reused=True)


def _do_nothing(config: Mapping[str, Any]) -> None:
    for rung in range(RUNGS):
        tune.report({"rung": rung, "validation": 0.0})


def _arithmetic(
    options: argparse.Namespace, settings: SearchSettings, category: Category
) -> dict[str, float]:
    """Seconds of encoding all banks, and of training all lanes: a process a core, a thread each,
    which load the backbone before the clock runs."""
    points = [settings.fit_settings(point) for point in drawn(settings.space, settings.trials)]
    seeds = settings.support_seeds
    supports = [category.support_set(settings.shots, seed) for seed in seeds]
    with ProcessPoolExecutor(
        options.threads, get_context("spawn"), _load_once, (settings.backbone,)
    ) as pool:
        # One for each process, so that all have started.
        list(pool.map(time.sleep, [2.0] * options.threads))
        with CpuMeter() as encoding:
            started = time.perf_counter()
            banks = list(pool.map(partial(_encode, settings), supports, seeds))
            judges = [
                (support, seed, seen)
                for seen in settings.judging()
                for support, seed in zip(supports, seeds, strict=True)
            ]
            list(pool.map(partial(_encode_judge, settings), *zip(*judges, strict=True)))
            encoded = time.perf_counter()
        with CpuMeter() as training:
            parts = [points[part :: options.threads] for part in range(options.threads)]
            list(pool.map(partial(_train, settings.backbone, banks), parts))
            trained = time.perf_counter()
    return {
        "encoding": encoded - started,
        "encoding CPU": encoding.seconds,
        "trainer": trained - encoded,
        "trainer CPU": training.seconds,
    }


@lru_cache(maxsize=8)
def _load_once(spec: BackboneSpec) -> FrozenCLIP:
    torch.set_num_threads(1)
    return load_backbone(spec)


def _encode(settings: SearchSettings, support: Sequence[Location], seed: int) -> SupportBank:
    backbone = _load_once(settings.backbone)
    made_from = BankSpec.of(
        FitSettings(),
        support,
        fingerprint=backbone.fingerprint,
        seed=seed,
        strengths=NOISE_LADDER,
    )
    return encode_support(backbone, [read_image(path) for path in support], made_from)


def _encode_judge(
    settings: SearchSettings, support: Sequence[Location], seed: int, seen: BackboneSpec
) -> Judge:
    backbone = _load_once(seen)
    spec = JudgeSpec.of(
        settings.fit_settings(), file_digests(support), fingerprint=backbone.fingerprint, seed=seed
    )
    return encode_judge(backbone, [read_image(path) for path in support], spec)


def _train(
    spec: BackboneSpec, banks: Sequence[SupportBank], settings: Sequence[FitSettings]
) -> None:
    lanes = [
        fold(bank, image, one) for one in settings for bank in banks for image in range(bank.shots)
    ]
    PromptTrainer(_load_once(spec), lanes).advance(settings[0].steps)


def _ordinary(
    options: argparse.Namespace, settings: SearchSettings, category: Category, folder: Path
) -> None:
    supports = {seed: category.support_set(settings.shots, seed) for seed in settings.support_seeds}
    configs = [
        {"settings": settings, "point": point, "supports": supports}
        for point in drawn(settings.space, options.ordinary_trials)
    ]
    # As many at a time as there are cores, one thread each: the fastest of those tried.
    _tune(_ordinary_trial, configs, options.threads, 1.0, folder, is_reused=False)


def _ordinary_trial(config: Mapping[str, Any]) -> None:
    torch.set_num_threads(1)
    given = config["trial"]
    search: SearchSettings = given["settings"]
    backbone = load_backbone(search.backbone_of(given["point"]))
    settings = search.fit_settings(given["point"])
    lanes, judges = [], []
    for seed, support in given["supports"].items():
        images = [read_image(path) for path in support]
        made_from = BankSpec.of(settings, support, fingerprint=backbone.fingerprint, seed=seed)
        judged_by = JudgeSpec.of(
            settings, made_from.support, fingerprint=backbone.fingerprint, seed=seed
        )
        judges.append(encode_judge(backbone, images, judged_by))
        bank = encode_support(backbone, images, made_from)
        lanes += [fold(bank, image, settings) for image in range(bank.shots)]
    trainers = [PromptTrainer(backbone, [lane]) for lane in lanes]
    for rung in range(1, RUNGS + 1):
        for trainer in trainers:
            trainer.advance(settings.steps * rung // RUNGS - trainer.steps_done)
        text_TPE = torch.cat([trainer.text_features() for trainer in trainers])
        value = judge_folds(backbone, lanes, text_TPE, judges)
        tune.report({"rung": rung, "validation": value.value})


def _tune(
    trial: Callable[[Mapping[str, Any]], None],
    configs: Sequence[Mapping[str, Any]],
    live: int | None,
    cpus: float,
    folder: Path,
    *,
    is_reused: bool,
) -> None:
    tune.Tuner(
        tune.with_resources(trial, {"CPU": cpus}),
        param_space={"trial": tune.grid_search(list(configs))},
        tune_config=tune.TuneConfig(max_concurrent_trials=live, reuse_actors=is_reused),
        run_config=tune.RunConfig(name="benchmark", storage_path=str(folder), verbose=0),
    ).fit()


def _rows(seconds: Mapping[str, float], unit: str) -> list[Row]:
    engine, lanes, ordinary = seconds["engine"], seconds["lanes"], seconds["ordinary"]
    floors = ("Tune", "trainer", "encoding")
    return [
        compared("lanes alone against the ordinary way", lanes, ordinary, unit),
        compared("lanes and engine against the ordinary way", engine, ordinary, unit),
        compared("lanes and engine against lanes alone", engine, lanes, unit),
        *(
            compared(
                f"{name} against the floors", ours, sum(seconds[floor] for floor in floors), unit
            )
            for name, ours in (("lanes alone", lanes), ("lanes and engine", engine))
        ),
        *(compared(f"floor: {name}", seconds[name], lanes, unit) for name in floors),
        compared("lanes alone with ASHA against without", seconds["asha"], lanes, unit),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="builtin", metavar="NAME")
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--ordinary-trials", type=int, default=8)
    parser.add_argument("--live-trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3, help="number of support seeds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPUs of Ray")
    parser.add_argument("--engine-threads", type=int, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


if __name__ == "__main__":
    main()
