import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from apt_ray.data.folders import Category
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.detection.rule import RULE_VERSION
from apt_ray.errors import PromptSetError, WriteError
from apt_ray.features.clip import FrozenCLIP
from apt_ray.images import read_image
from apt_ray.tensors import seal

WRITTEN_BY_0_1 = Path(__file__).with_name("prompt_set_0_1.safetensors")


def test_saved_and_loaded_prompt_sets_give_bit_identical_maps(
    backbone: FrozenCLIP, prompt_set: PromptSet, category: Category, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "set.safetensors"
    prompt_set.save(path)
    loaded = PromptSet.load(path)
    assert loaded.provenance == prompt_set.provenance
    images = [read_image(image.path) for image in category.test[:3]]
    before = Detector(backbone, prompt_set).inspect(images)
    after = Detector(backbone, loaded).inspect(images)
    for first, second in zip(before, after, strict=True):
        assert (first.anomaly_map == second.anomaly_map).all()
        assert first.anomaly_score == second.anomaly_score
    assert loaded.to_bytes() == prompt_set.to_bytes()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_place_that_takes_no_file_is_named(prompt_set: PromptSet, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"cannot write .*choose another place"):
        prompt_set.save(tmp_path / "file" / "set.safetensors")


def test_a_file_that_is_missing_cut_short_or_foreign_is_refused(
    prompt_set: PromptSet, tmp_path: Path
) -> None:
    with pytest.raises(PromptSetError, match="cannot read"):
        PromptSet.load(tmp_path / "missing.safetensors")
    data = prompt_set.to_bytes()
    for rubbish in (b"", b"rubbish", data[:100], data[:-10], b"\xff" * 64):
        with pytest.raises(PromptSetError, match="damaged"):
            PromptSet.from_bytes(rubbish)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(PromptSetError, match="not a prompt set"):
        PromptSet.load(foreign)


def _rewrite(prompt_set: PromptSet, path: Path, **changes: object) -> Path:
    """The prompt set as another version, or another program, would have written it."""
    prompt_set.save(path)
    tensors = load_file(path)
    header = prompt_set.provenance.model_dump(mode="json")
    for name, value in changes.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        else:
            header[name] = value
    save_file(tensors, path, seal(json.dumps(header), tensors))
    return path


def test_damage_that_keeps_the_length_is_noticed(prompt_set: PromptSet) -> None:
    data = prompt_set.to_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    middle = (start + len(data)) // 2
    header = json.loads(data[8:start])["__metadata__"]["apt-ray"]
    name = data.index(prompt_set.category.encode())
    threshold = data.index(header.partition('"value":')[2][:6].encode())
    for place, length in ((start, 400), (middle, 1), (len(data) - 64, 64), (name, 1)):
        zeroed = data[:place] + bytes(b ^ 1 for b in data[place : place + length])
        with pytest.raises(PromptSetError, match=r"damaged .*copy it again from where it came"):
            PromptSet.from_bytes(zeroed + data[place + length :])
    moved = data[: threshold + 3] + b"9" + data[threshold + 4 :]
    assert moved != data
    with pytest.raises(PromptSetError, match="damaged"):
        PromptSet.from_bytes(moved)


def test_a_file_without_its_digest_is_refused(prompt_set: PromptSet, tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    prompt_set.save(path)
    save_file(load_file(path), path, {"apt-ray": prompt_set.provenance.model_dump_json()})
    with pytest.raises(PromptSetError, match="SHA-256"):
        PromptSet.load(path)


def test_another_format_version_is_refused_by_its_number(
    prompt_set: PromptSet, tmp_path: Path
) -> None:
    path = _rewrite(prompt_set, tmp_path / "set.safetensors", format_version=99)
    with pytest.raises(PromptSetError, match="format 99"):
        PromptSet.load(path)


def test_a_format_to_come_is_refused_by_its_number_whatever_else_it_says(
    prompt_set: PromptSet, tmp_path: Path
) -> None:
    path = _rewrite(prompt_set, tmp_path / "set.safetensors", format_version=2, novelty=1)
    with pytest.raises(PromptSetError, match="format 2, this version of apt-ray reads 1"):
        PromptSet.load(path)


def test_a_threshold_that_is_no_number_is_refused(prompt_set: PromptSet, tmp_path: Path) -> None:
    threshold = {**prompt_set.threshold.model_dump(), "value": float("nan")}
    path = _rewrite(prompt_set, tmp_path / "set.safetensors", threshold=threshold)
    with pytest.raises(PromptSetError, match="fit or register"):
        PromptSet.load(path)


@pytest.mark.parametrize("header", ["[]", "1", '"text"', "null"])
def test_a_header_that_is_no_table_is_refused(
    prompt_set: PromptSet, tmp_path: Path, header: str
) -> None:
    path = tmp_path / "set.safetensors"
    prompt_set.save(path)
    tensors = load_file(path)
    save_file(tensors, path, seal(header, tensors))
    with pytest.raises(PromptSetError, match="fit or register"):
        PromptSet.load(path)


def test_a_memory_without_a_layer_is_refused(prompt_set: PromptSet, tmp_path: Path) -> None:
    extra = {"memory.x": torch.zeros(3, 5)}
    path = _rewrite(prompt_set, tmp_path / "set.safetensors", **extra)
    with pytest.raises(PromptSetError, match="do not fit together"):
        PromptSet.load(path)


def test_a_set_of_another_score_rule_is_refused_with_the_remedy(
    prompt_set: PromptSet, tmp_path: Path
) -> None:
    path = _rewrite(prompt_set, tmp_path / "set.safetensors", rule_version=RULE_VERSION + 1)
    with pytest.raises(PromptSetError, match=r"threshold means nothing.*fit or register"):
        PromptSet.load(path)


def test_a_set_of_an_earlier_rule_is_refused_with_the_remedy() -> None:
    """`apt-ray fit --shots 2 --reference-size 16 --context-length 2 --region object` of 0.1."""
    with pytest.raises(PromptSetError, match=r"rule 1.* rule 2.* fit or register the category"):
        PromptSet.load(WRITTEN_BY_0_1)


def test_unknown_fields_are_refused(prompt_set: PromptSet, tmp_path: Path) -> None:
    path = _rewrite(prompt_set, tmp_path / "set.safetensors", novelty=1)
    with pytest.raises(PromptSetError, match="novelty"):
        PromptSet.load(path)


@pytest.mark.parametrize("name", ["text_features", "meta_features", "contexts"])
def test_tensors_that_do_not_fit_together_are_refused(
    prompt_set: PromptSet, tmp_path: Path, name: str
) -> None:
    path = _rewrite(prompt_set, tmp_path / "set.safetensors", **{name: torch.zeros(3, 5)})
    with pytest.raises(PromptSetError, match="do not fit together"):
        PromptSet.load(path)


def test_values_that_are_no_numbers_are_refused(prompt_set: PromptSet, tmp_path: Path) -> None:
    broken = torch.full_like(prompt_set.text_features, torch.nan)
    path = _rewrite(prompt_set, tmp_path / "set.safetensors", text_features=broken)
    with pytest.raises(PromptSetError, match="do not fit together"):
        PromptSet.load(path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float16, torch.bool])
@pytest.mark.parametrize("name", ["text_features", "meta_features", "contexts"])
def test_tensors_of_another_kind_are_refused(
    prompt_set: PromptSet, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    other = getattr(prompt_set, name).to(dtype)
    path = _rewrite(prompt_set, tmp_path / "set.safetensors", **{name: other})
    with pytest.raises(PromptSetError, match=r"do not fit together .*fit or register"):
        PromptSet.load(path)


def test_a_memory_of_another_kind_or_with_more_beside_it_is_refused(
    prompt_set: PromptSet, tmp_path: Path
) -> None:
    layer, tokens = next(iter(prompt_set.memory.layers.items()))
    for changes in ({f"memory.{layer}": tokens.float()}, {"more": torch.zeros(2)}):
        path = _rewrite(prompt_set, tmp_path / "set.safetensors", **changes)
        with pytest.raises(PromptSetError, match="do not fit together"):
            PromptSet.load(path)


def test_features_of_another_width_than_the_backbones_are_refused(
    backbone: FrozenCLIP, prompt_set: PromptSet, category: Category, tmp_path: Path
) -> None:
    layer, tokens = next(iter(prompt_set.memory.layers.items()))
    narrow = {
        "text_features": prompt_set.text_features[:, :-1],
        "meta_features": prompt_set.meta_features[:, :-1],
    }
    image = read_image(category.good[0])
    for changes in ({f"memory.{layer}": tokens[:, :-1].contiguous()}, narrow):
        whole = {name: tensor.contiguous() for name, tensor in changes.items()}
        path = _rewrite(prompt_set, tmp_path / "set.safetensors", **whole)
        with pytest.raises(PromptSetError, match=r"its backbone gives .*fit or register"):
            Detector(backbone, PromptSet.load(path)).inspect([image])
