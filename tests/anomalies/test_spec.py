import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import apt_ray
from apt_ray.anomalies.bank import encode_support
from apt_ray.anomalies.spec import BankSpec, EncodedSpec, JudgeSpec, file_digests
from apt_ray.config import FitSettings
from apt_ray.data.folders import Category
from apt_ray.errors import DataError, SettingsError
from apt_ray.images import read_image
from apt_ray.validation.judge import encode_judge
from tests.fakes import FakeBackbone, bank_spec, judge_spec


def differ(first: EncodedSpec, changes: dict[str, Any]) -> bool:
    """Whether each of these changes, which are all that there can be, makes another digest."""
    assert set(changes) == set(type(first).model_fields)
    others = [first.model_copy(update={name: value}) for name, value in changes.items()]
    return len({spec.digest for spec in (first, *others)}) == 1 + len(others)


def test_a_digest_covers_every_field(category: Category, tmp_path: Path) -> None:
    images = list(category.good[:2])
    first = BankSpec.of(FitSettings(), images, fingerprint="f")
    changes = {
        "fingerprint": "g",
        "support": first.support[::-1],
        "seed": 1,
        "strengths": (0.1,),
        "region": "everywhere",
        "object_mask": False,
        "ground": "black",
        "white_level": 4095,
    }
    assert differ(first, changes)
    judge = JudgeSpec.of(FitSettings(), first.support, fingerprint="f", seed=0)
    changes = {
        "fingerprint": "g",
        "support": first.support[::-1],
        "seed": 1,
        "ground": "black",
        "white_level": 4095,
        "reference_copies": 7,
        "reference_rotations": 2,
        "reference_size": 11,
    }
    assert differ(judge, changes)

    copies = [tmp_path / "x.png", tmp_path / "y.png"]
    for copy, image in zip(copies, images, strict=True):
        copy.write_bytes(image.read_bytes())
    assert BankSpec.of(FitSettings(), copies, fingerprint="f").digest == first.digest
    with pytest.raises(DataError, match="missing"):
        file_digests([tmp_path / "missing.png"])


@pytest.mark.parametrize(
    "source", ["features/clip.py", "anomalies/noise.py", "images.py", "levels.py"]
)
def test_a_change_of_the_code_that_encodes_makes_another_bank(source: str, tmp_path: Path) -> None:
    package = Path(apt_ray.__file__).parent
    shutil.copytree(package, tmp_path / "apt_ray", ignore=shutil.ignore_patterns("__pycache__"))

    def digest() -> str:
        command = (
            "from apt_ray.anomalies.spec import BankSpec;"
            "print(BankSpec(fingerprint='f', support=('a',), seed=0).digest)"
        )
        found = subprocess.run(
            [sys.executable, "-c", command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return found.stdout

    before = digest()
    assert digest() == before
    with (tmp_path / "apt_ray" / source).open("a") as file:
        file.write("# edited\n")
    assert digest() != before


def test_banks_and_judges_are_made_by_the_encoder_and_from_the_images_that_their_spec_names(
    category: Category,
) -> None:
    encoder = FakeBackbone()
    image = read_image(category.good[0])
    with pytest.raises(SettingsError, match="make its spec"):
        encode_support(encoder, [image], bank_spec(encoder, 2))
    with pytest.raises(SettingsError, match="make its spec"):
        encode_support(encoder, [image], bank_spec(FakeBackbone(fingerprint="other"), 1))
    with pytest.raises(SettingsError, match="make its spec"):
        encode_judge(encoder, [image], judge_spec(encoder, 2))


def test_a_lane_is_refused_a_bank_of_other_noise() -> None:
    spec = bank_spec(FakeBackbone(), 1, strengths=(0.3,))
    assert spec.suits(FitSettings())
    for changed in (
        FitSettings(noise_strength=0.1),
        FitSettings(region="everywhere"),
        FitSettings(object_mask=False),
    ):
        assert not spec.suits(changed)
        with pytest.raises(SettingsError, match="encode the support set with these"):
            spec.check(changed)
