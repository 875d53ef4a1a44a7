"""`apt-ray fit`: from normal images to a prompt set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from apt_ray.cli.common import (
    add_backbone,
    add_command,
    add_settings,
    backbone,
    bar,
    print_confirmation,
)
from apt_ray.cli.common import settings as given_settings
from apt_ray.cli.flags import count
from apt_ray.files import check_writable, keep, location


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    fit = add_command(commands, "fit", _run, "learn one product from normal images")
    fit.add_argument(
        "--data",
        type=location,
        required=True,
        help="folder of the product, or s3://bucket/prefix: normal images directly in it, in good/"
        " or in train/good/",
    )
    fit.add_argument("--out", type=Path, required=True, help="prompt set to write (.safetensors)")
    fit.add_argument("--shots", type=count, default=4, help="normal images to learn from (4)")
    fit.add_argument(
        "--calibrate",
        action="store_true",
        help="set the threshold from the normal images that are not learned from;"
        " with 19 of them a false-alarm rate of 5%% is certified",
    )
    fit.add_argument(
        "--confirmed",
        type=location,
        metavar="DIR",
        help="images of confirmed defects, a folder for each kind, whose names it will then know;"
        " no verdict depends on them",
    )
    add_settings(fit)
    add_backbone(fit)


def _run(options: argparse.Namespace) -> int:
    check_writable(options.out)
    from apt_ray.data.distinct import describe_copies
    from apt_ray.data.folders import find_categories, find_defects
    from apt_ray.errors import DataError
    from apt_ray.levels import FULL
    from apt_ray.prompts.confirm import confirm, read_defects
    from apt_ray.prompts.fit import fit

    categories = find_categories(options.data)
    if len(categories) > 1:
        raise DataError(
            f"{options.data} holds {len(categories)} products: give the folder of one of them, e.g."
            f" {categories[0].root}"
        )
    (category,) = categories
    print(category.contents)
    settings = given_settings(options)
    # One is enough to calibrate on; all that are left are read by the fit.
    drawn = category.draw(options.shots, settings.seed, calibration=1 if options.calibrate else 0)
    others = tuple(path for path in category.good if path not in drawn.support)
    confirmed = find_defects(options.confirmed) if options.confirmed else []
    read_defects(confirmed)  # what is wrong with them is said before the fit
    loaded = backbone(options)
    with bar(f"fitting {category.name}") as progress:
        prompt_set = fit(
            category.name,
            drawn.support,
            settings,
            backbone=loaded,
            calibration=others if options.calibrate else (),
            progress=progress,
        )
    if confirmed:
        confirmation = confirm(prompt_set, confirmed, loaded)
        print_confirmation(confirmation, confirmed)
        prompt_set = confirmation.prompt_set
    keep(options.out, prompt_set.save)
    copies = prompt_set.provenance.copies if options.calibrate else drawn.copies
    if copies:
        print(f"warning: {describe_copies(copies)}", file=sys.stderr)
    threshold = prompt_set.threshold
    rate = threshold.certified_false_alarm_rate
    print(f"{options.out}: {category.name}, {len(drawn.support)} shots")
    print(
        f"threshold {threshold.value:.4f} from {len(threshold.scores)} {threshold.source}, "
        + ("uncertified" if rate is None else f"false-alarm rate certified at {rate:.1%}")
    )
    if prompt_set.reading.white_level != FULL:
        print(f"16-bit images are read with white at {prompt_set.reading.white_level}")
    return 0
