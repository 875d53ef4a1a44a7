import hashlib
from pathlib import Path

import pytest
import torch

from apt_ray.errors import BackboneError
from apt_ray.features.builtin.apt_mini import (
    BuiltinBackbone,
    build_model,
    load_builtin,
    save_builtin,
)
from apt_ray.features.constants import BackboneConstants
from apt_ray.features.weights import BUILTIN_FOLDER

CONSTANTS = BackboneConstants(
    dense_scale=12.5,
    dense_bias=-0.5,
    reference_scale=9.0,
    reference_bias=-2.0,
    reference_layers=(2, 3),
)


@pytest.fixture(scope="module")
def shipped() -> BuiltinBackbone:
    return load_builtin()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exported")
    save_builtin(build_model(), [320, 49406, 49407], CONSTANTS, folder)
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    for name in ("apt-mini.safetensors", "apt-mini.sha256"):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


def test_the_shipped_backbone_encodes_images_and_texts_into_one_space(
    shipped: BuiltinBackbone,
) -> None:
    with torch.inference_mode():
        image = shipped.model.encode_image(torch.zeros(2, 3, 128, 128), normalize=True)
        text = shipped.model.encode_text(
            shipped.tokenizer(["a flawless surface", "a surface with a defect"]), normalize=True
        )
    assert image.shape == text.shape == (2, 128)
    assert (text[0] @ text[1]).item() < 0.99


def test_the_shipped_backbone_is_frozen_float32_in_eval_mode(shipped: BuiltinBackbone) -> None:
    assert not shipped.model.training
    assert all(p.dtype == torch.float32 for p in shipped.model.parameters())
    assert not any(p.requires_grad for p in shipped.model.parameters())
    assert len(shipped.model.visual.image_mean) == len(shipped.model.visual.image_std) == 3


def test_the_reference_layers_are_blocks_of_the_model(shipped: BuiltinBackbone) -> None:
    blocks = len(shipped.model.visual.transformer.resblocks)
    assert set(shipped.constants.reference_layers) <= set(range(blocks))


def test_what_is_shipped_is_at_most_10_megabytes() -> None:
    assert (
        sum(path.stat().st_size for path in BUILTIN_FOLDER.iterdir() if path.is_file())
        <= 10 * 2**20
    )


def test_saved_weights_and_constants_come_back(exported: Path) -> None:
    torch.manual_seed(0)
    original = build_model().state_dict()
    loaded = load_builtin(exported)
    assert loaded.constants == CONSTANTS
    state = loaded.model.state_dict()
    table = "token_embedding.weight"
    torch.testing.assert_close(state[table][320], original[table][320].half().float())
    for name in original.keys() - {table}:
        torch.testing.assert_close(state[name], original[name].half().float())


def test_untrained_tokens_are_the_same_on_every_load_and_of_the_trained_scale(
    exported: Path,
) -> None:
    first, second = (load_builtin(exported).model.token_embedding.weight for _ in range(2))
    assert torch.equal(first, second)
    trained, filled = first[[320, 49406, 49407]].std(), first[1000:2000].std()
    assert filled.item() == pytest.approx(trained.item(), rel=0.05)
    # The raw stream of PCG64(0) starts with 11749869230777074271.
    unit = (11749869230777074271 >> 11) * 2.0**-53
    assert first[0, 0].item() == pytest.approx((2 * unit - 1) * 3**0.5 * trained.item(), rel=1e-5)


def test_saving_twice_writes_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = save_builtin(build_model(), [49407, 49406, 320], CONSTANTS, tmp_path)
    assert path.read_bytes() == (exported / path.name).read_bytes()


def test_a_damaged_file_is_refused(exported: Path, tmp_path: Path) -> None:
    path = copy_of(exported, tmp_path) / "apt-mini.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BackboneError, match=r"apt-mini\.safetensors is damaged .* install apt-ray"):
        load_builtin(tmp_path)


@pytest.mark.parametrize("name", ["apt-mini.safetensors", "apt-mini.sha256"])
def test_a_missing_file_is_named(exported: Path, tmp_path: Path, name: str) -> None:
    (copy_of(exported, tmp_path) / name).unlink()
    with pytest.raises(BackboneError, match=rf"cannot read .*{name}.*install apt-ray again"):
        load_builtin(tmp_path)


def test_a_foreign_file_is_refused_even_with_a_matching_digest(tmp_path: Path) -> None:
    data = b"not safetensors"
    (tmp_path / "apt-mini.safetensors").write_bytes(data)
    (tmp_path / "apt-mini.sha256").write_text(hashlib.sha256(data).hexdigest())
    with pytest.raises(BackboneError, match="does not fit this version"):
        load_builtin(tmp_path)
