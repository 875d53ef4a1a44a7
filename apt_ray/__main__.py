"""The command line for people without a cluster: `apt-ray`, or `python -m apt_ray`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from apt_ray.config import FitSettings
from apt_ray.errors import AptError
from apt_ray.flags import add_backbone_flags, add_flags, given, given_backbone
from apt_ray.storage import location

if TYPE_CHECKING:
    from apt_ray.backbone import FrozenCLIP
    from apt_ray.evaluation import Result

_TWO_KINDS = 2
_EXAMPLES = 4  # good and defective images of each kind that a report shows

# The heavy modules are imported inside the commands, so that `--help` answers at once.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 a clear error, 2 wrong usage."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except AptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="apt-ray",
        description="Find defects in pictures of products, from a handful of good pictures.",
        epilog="Start with `apt-ray sample --out data`, then"
        " `apt-ray fit --data data/washer --out washer.safetensors`.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    sample = _command(
        commands, "sample", _sample, "draw three product categories with defects to try things on"
    )
    sample.add_argument("--out", type=Path, required=True, help="folder to create")
    sample.add_argument("--seed", type=int, default=0, help="other seeds draw other pictures")

    fit = _command(commands, "fit", _fit, "learn one product from good pictures")
    fit.add_argument(
        "--data",
        type=location,
        required=True,
        help="folder of the product, or s3://bucket/prefix: good pictures directly in it, in good/"
        " or in train/good/",
    )
    fit.add_argument("--out", type=Path, required=True, help="prompt set to write (.safetensors)")
    fit.add_argument("--shots", type=_count, default=4, help="good pictures to learn from (4)")
    fit.add_argument(
        "--calibrate",
        action="store_true",
        help="set the threshold from the good pictures that are not learned from;"
        " with 19 of them a false-alarm rate of 5%% is certified",
    )
    _add_settings(fit)
    _add_backbone(fit)

    inspect = _command(commands, "inspect", _inspect, "look for defects in pictures")
    inspect.add_argument("prompt_set", type=Path, help="file that `fit` wrote")
    inspect.add_argument("images", type=Path, nargs="+", help="pictures, or folders of pictures")
    inspect.add_argument("--out", type=Path, help="folder for overlay pictures")
    inspect.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    inspect.add_argument("--device", default="cpu", help="torch device (cpu)")

    evaluate = _command(
        commands, "evaluate", _evaluate, "measure on labelled test pictures, over several seeds"
    )
    evaluate.add_argument(
        "--data",
        type=location,
        required=True,
        help="folder of products, or s3://bucket/prefix, in MVTec AD, VisA or plain layout",
    )
    evaluate.add_argument(
        "--categories", nargs="+", default=[], metavar="NAME", help="only these products"
    )
    evaluate.add_argument("--shots", type=_count, default=4, help="support images a fit (4)")
    evaluate.add_argument(
        "--seeds", type=_seeds, default=(0, 1, 2), help="comma-separated seeds (0,1,2)"
    )
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write every result as JSON")
    evaluate.add_argument(
        "--scores",
        type=Path,
        metavar="FILE",
        help="write the scores of every image (.npz), for `compare`",
    )
    evaluate.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="write a page with tables, curves and images with their maps to DIR/index.html",
    )
    _add_settings(evaluate)
    _add_backbone(evaluate)

    compare = _command(
        commands, "compare", _compare, "say whether one evaluation is better than another"
    )
    compare.add_argument("before", type=Path, help="file of `evaluate --scores`")
    compare.add_argument("after", type=Path, help="another, of the same test pictures")
    compare.add_argument("--json", type=Path, metavar="FILE", help="write the differences as JSON")
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.set_defaults(run=run)
    return command


def _add_settings(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("settings of the fit", "the defaults need no tuning")
    is_evaluation = command.prog.endswith("evaluate")  # which has seeds of its own
    add_flags(group, FitSettings, prefix="fit_", without={"seed"} if is_evaluation else ())


def _add_backbone(command: argparse.ArgumentParser) -> None:
    add_backbone_flags(command)
    command.add_argument("--device", default="cpu", help="torch device (cpu)")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _settings(options: argparse.Namespace) -> FitSettings:
    return given(options, FitSettings, prefix="fit_")


def _backbone(options: argparse.Namespace) -> FrozenCLIP:
    from apt_ray.backbone import load_backbone

    backbone = load_backbone(given_backbone(options), device=options.device)
    if backbone.tiles > 1:
        _print_cost_of_tiles(backbone)
    return backbone


def _print_cost_of_tiles(backbone: FrozenCLIP) -> None:
    import torch

    image = torch.zeros(1, 3, backbone.input_size, backbone.input_size)
    seconds = []
    for _ in range(2):  # the first pass warms up
        started = time.perf_counter()
        backbone.encode_images(image).tokens_BNE.cpu()
        seconds.append(time.perf_counter() - started)
    side = backbone.tiles
    print(
        f"{side} x {side} tiles: an image of {backbone.input_size} px takes {side**2} passes of the"
        f" vision tower, {1000 * seconds[-1]:.0f} ms here"
    )


@contextmanager
def _bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on the terminal, as a callback that takes (done, total)."""
    with tqdm(desc=text, leave=False, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _sample(options: argparse.Namespace) -> int:
    from apt_ray.data.samples import write_samples

    with _bar("drawing") as progress:
        folders = write_samples(options.out, seed=options.seed, progress=progress)
    for folder in folders:
        print(folder)
    return 0


def _fit(options: argparse.Namespace) -> int:
    from apt_ray.data.folders import find_categories
    from apt_ray.errors import DataError
    from apt_ray.fitting import fit

    categories = find_categories(options.data)
    if len(categories) > 1:
        raise DataError(
            f"{options.data} holds {len(categories)} products: give the folder of one of them, e.g."
            f" {categories[0].root}"
        )
    (category,) = categories
    settings = _settings(options)
    support = category.support_set(options.shots, settings.seed)
    others = tuple(path for path in category.good if path not in support)
    if options.calibrate and not others:
        raise DataError(
            f"no good picture of {category.name} is left for calibration: use fewer --shots, or"
            f" leave out --calibrate"
        )
    with _bar(f"fitting {category.name}") as progress:
        prompt_set = fit(
            category.name,
            support,
            settings,
            backbone=_backbone(options),
            calibration=others if options.calibrate else (),
            progress=progress,
        )
    prompt_set.save(options.out)
    threshold = prompt_set.threshold
    rate = threshold.certified_false_alarm_rate
    print(f"{options.out}: {category.name}, {len(support)} shots")
    print(
        f"threshold {threshold.value:.4f} from {len(threshold.scores)} {threshold.source}, "
        + ("uncertified" if rate is None else f"false-alarm rate certified at {rate:.1%}")
    )
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from apt_ray.backbone import load_backbone
    from apt_ray.detector import Detector
    from apt_ray.images import draw_overlay, read_image
    from apt_ray.prompt_set import PromptSet

    paths = _pictures(options.images)
    prompt_set = PromptSet.load(options.prompt_set)
    detector = Detector(load_backbone(prompt_set.backbone, device=options.device), prompt_set)
    rows = []
    for path in tqdm(paths, desc="inspecting", leave=False, disable=None):
        image = read_image(path)
        (inspection,) = detector.inspect([image])
        verdict = "ANOMALOUS" if inspection.is_anomalous else "normal"
        p_value = "" if inspection.p_value is None else f"  p {inspection.p_value:.3f}"
        tqdm.write(
            f"{verdict:9}  score {inspection.anomaly_score:.4f}"
            f"  threshold {inspection.threshold:.4f}{p_value}  {path}"
        )
        row = {
            "image": str(path),
            "category": prompt_set.category,
            "anomaly_score": inspection.anomaly_score,
            "threshold": inspection.threshold,
            "is_anomalous": inspection.is_anomalous,
            "p_value": inspection.p_value,
        }
        if options.out is not None:
            overlay = draw_overlay(image, inspection.anomaly_map, threshold=inspection.threshold)
            target = options.out / f"{path.parent.name}-{path.stem}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            overlay.save(target)
            row["overlay"] = str(target)
        rows.append(row)
    if options.json is not None:
        _write_json(options.json, rows)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from apt_ray.comparison import format_types, save_scores
    from apt_ray.data.folders import find_categories
    from apt_ray.evaluation import evaluate, format_table

    categories = find_categories(options.data, options.categories)
    backbone = _backbone(options)
    results: list[Result] = []
    failed = False
    for category in categories:
        try:
            with tqdm(leave=False, disable=None) as bar:

                def show(what: str, done: int, total: int, bar: tqdm[None] = bar) -> None:
                    bar.set_description(f"{category.name}: {what}", refresh=False)  # noqa: B023
                    bar.total, bar.n = total, done
                    bar.refresh()

                results += evaluate(
                    category,
                    backbone=backbone,
                    shots=options.shots,
                    seeds=options.seeds,
                    settings=_settings(options),
                    examples=_EXAMPLES if options.report is not None else 0,
                    progress=show,
                )
        except AptError as error:
            # The other categories are still worth their figures.
            failed = True
            print(f"error: {error}", file=sys.stderr)
    if results:
        print(format_table(results))
        scores = [result.scores for result in results]
        if any(len(set(one.defect_types)) > _TWO_KINDS for one in scores):
            print(f"\n{format_types(scores)}")
        if options.scores is not None:
            save_scores(options.scores, scores)
        if options.report is not None:
            from apt_ray.report import write_report

            page = write_report(
                options.report, results, backbone=backbone, settings=_settings(options)
            )
            print(f"\nreport: {page}")
    if options.json is not None:
        _write_json(options.json, [result.as_dict() for result in results])
    return 1 if failed else 0


def _compare(options: argparse.Namespace) -> int:
    from apt_ray.comparison import compare, format_differences, load_scores

    differences = compare(load_scores(options.before), load_scores(options.after))
    print(format_differences(differences))
    if options.json is not None:
        _write_json(options.json, [asdict(difference) for difference in differences])
    return 0


def _pictures(paths: Sequence[Path]) -> list[Path]:
    from apt_ray.errors import DataError
    from apt_ray.images import IMAGE_SUFFIXES

    pictures: list[Path] = []
    for path in paths:
        if path.is_dir():
            pictures += sorted(
                file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES
            )
        else:
            pictures.append(path)
    if not pictures:
        raise DataError(f"no picture in {', '.join(map(str, paths))}: give files or other folders")
    return pictures


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
