"""Damaged image files against the decoder: `python -m benchmarks.fuzz [--images 100000]`.

Every file must become an RGB image within the limits or an error that names the cause; anything
else is printed with its seed, and the exit code is 1.
"""

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from apt_ray.errors import ImageError
from apt_ray.files import write_json
from apt_ray.images import ImageLimits, decode_image
from tests.mutations import mutated

_LIMITS = ImageLimits(max_bytes=2**20, max_pixels=1_000_000)
_SLOW_S = 1.0


def main() -> int:
    """Decode the files; returns the exit code."""
    parser = argparse.ArgumentParser(description="Damaged image files against the decoder.")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first file")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    warnings.simplefilter("ignore")  # Pillow's remarks on damaged files
    outcomes: Counter[str] = Counter()
    unexpected: list[str] = []
    slowest = 0.0
    started = time.perf_counter()
    for seed in tqdm(range(options.seed, options.seed + options.images), unit=" files"):
        begin = time.thread_time()  # not the clock: the machine has other work
        try:
            image = decode_image(mutated(seed), limits=_LIMITS)
            outcomes["decoded"] += 1
            if image.mode != "RGB" or image.width * image.height > _LIMITS.max_pixels:
                unexpected.append(f"seed {seed}: {image.mode} {image.size}")
        except ImageError as error:
            outcomes[type(error).__name__] += 1
        except Exception as error:
            unexpected.append(f"seed {seed}: {error!r}")
        took = time.thread_time() - begin
        slowest = max(slowest, took)
        if took > _SLOW_S:
            unexpected.append(f"seed {seed}: took {took:.1f} s")
    result = {
        "files": options.images,
        "seconds": round(time.perf_counter() - started, 1),
        "slowest_ms": round(1000 * slowest, 1),
        "outcomes": dict(outcomes),
        "unexpected": unexpected,
    }
    print(json.dumps(result, indent=2))
    if options.json:
        write_json(options.json, result)
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
