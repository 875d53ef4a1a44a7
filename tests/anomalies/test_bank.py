import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from apt_ray.anomalies.bank import (
    DRAWS,
    GUIDANCE_DRAWS,
    SELECTION_DRAWS,
    BankCache,
    SupportBank,
    encode_support,
)
from apt_ray.anomalies.families import GUIDANCE, SELECTION
from apt_ray.data.folders import Category
from apt_ray.features.clip import FrozenCLIP
from apt_ray.images import read_image
from tests.disks import full_disk
from tests.fakes import bank_spec


def test_a_bank_holds_every_draw_of_every_image(backbone: FrozenCLIP, bank: SupportBank) -> None:
    patches, width = backbone.grid[0] * backbone.grid[1], bank.clean_SVNE.shape[-1]
    assert bank.shots == 3
    assert set(bank.noisy_SDNE) == {0.1, 0.3}
    assert bank.noisy_SDNE[0.1].shape == (3, DRAWS, patches, width)
    assert bank.noisy_labels_SDN.shape == (3, DRAWS, patches)
    assert bank.guidance.names == tuple(GUIDANCE)
    assert bank.guidance.tokens_FSDNE.shape == (5, 3, GUIDANCE_DRAWS, patches, width)
    assert bank.selection is not None
    assert bank.selection.names == tuple(SELECTION)
    assert bank.selection.tokens_FSDNE.shape == (7, 3, SELECTION_DRAWS, patches, width)
    assert bank.selection.labels_FSDN.shape == (7, 3, SELECTION_DRAWS, patches)


def test_tokens_belong_to_the_image_that_they_are_filed_under(
    backbone: FrozenCLIP, category: Category, bank: SupportBank
) -> None:
    image = read_image(category.support_set(3, seed=0)[1])
    own = backbone.encode_images(backbone.preprocess([image])).tokens_BNE[0]
    assert torch.allclose(bank.clean_SVNE[1, 0].float(), own, atol=2e-3)
    assert torch.allclose(bank.support.tokens_BNE[1], own, atol=1e-5)


def test_a_bank_is_repeatable_survives_pickling_and_counts_its_work(
    backbone: FrozenCLIP, category: Category
) -> None:
    images = [read_image(category.good[0])]
    seen: list[tuple[int, int]] = []
    spec = bank_spec(backbone, 1, seed=1, strengths=(0.2,))
    first = encode_support(
        backbone, images, spec, progress=lambda done, total: seen.append((done, total))
    )
    second = pickle.loads(pickle.dumps(encode_support(backbone, images, spec)))  # noqa: S301
    assert torch.equal(first.noisy_SDNE[0.2], second.noisy_SDNE[0.2])
    assert first.selection is not None
    assert second.selection is not None
    assert torch.equal(first.selection.labels_FSDN, second.selection.labels_FSDN)
    done, total = seen[-1]
    assert done == total


def test_a_single_image_is_judged_on_another_crop_of_it(
    backbone: FrozenCLIP, category: Category
) -> None:
    one = encode_support(
        backbone, [read_image(category.good[0])], bank_spec(backbone, 1, strengths=(0.2,))
    )
    assert not torch.allclose(one.clean_SVNE, one.judged_clean_SVNE)
    cosine = (
        one.clean_SVNE.float().mean((0, 1, 2)) * one.judged_clean_SVNE.float().mean((0, 1, 2))
    ).sum()
    assert cosine.item() == pytest.approx(
        one.clean_SVNE.float().mean((0, 1, 2)).square().sum().item(), rel=0.2
    )


def _disk(size: int = 128) -> Image.Image:
    """A bright rough disk on a dark ground."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size - 0.5
    gray = np.where(np.hypot(x, y) < 0.3, 0.75, 0.15) + 0.05 * rng.standard_normal((size, size))
    pixels = (gray.clip(0, 1)[..., None].repeat(3, 2) * 255).astype(np.uint8)
    return Image.fromarray(pixels)


def test_noise_stays_on_the_part(backbone: FrozenCLIP) -> None:
    def encoded(**fields: Any) -> SupportBank:
        return encode_support(
            backbone, [_disk()], bank_spec(backbone, 1, strengths=(0.3,), **fields)
        )

    bank = encoded(judged=False)
    assert 0.15 < bank.objects_SN.float().mean() < 0.45
    off_part_N = ~bank.objects_SN[0]
    # The disk lies in the middle, so its mirror images do too.
    labels_DN = bank.noisy_labels_SDN[0][:, off_part_N]
    assert (labels_DN == 0).float().mean() > 0.97
    assert (bank.noisy_labels_SDN == 1).any()

    whole = encoded(region="everywhere", judged=False)
    on_part = bank.objects_SN[0]
    assert (whole.noisy_labels_SDN[0][:, on_part] == 1).float().mean() > 0.8

    judged = [encoded(region=region).selection for region in ("random", "everywhere")]
    assert judged[0] is not None
    assert judged[1] is not None
    # Wherever noise falls, trials are judged on the same pixels.
    assert torch.equal(judged[0].tokens_FSDNE, judged[1].tokens_FSDNE)

    unmasked = encoded(object_mask=False, judged=False)
    assert unmasked.objects_SN.all()


def test_a_draw_remembers_the_view_that_it_was_made_from(
    backbone: FrozenCLIP, bank: SupportBank
) -> None:
    undisturbed = bank.noisy_labels_SDN == 0
    views_SDNE = bank.clean_SVNE[torch.arange(bank.shots)[:, None], bank.noisy_views_SD].float()
    cosine_SDN = (views_SDNE * bank.noisy_SDNE[0.1].float()).sum(-1)
    assert cosine_SDN[undisturbed].mean() > 0.9
    others_SDNE = bank.clean_SVNE[torch.arange(bank.shots)[:, None], 3 - bank.noisy_views_SD]
    others = (others_SDNE.float() * bank.noisy_SDNE[0.1].float()).sum(-1)
    assert others[undisturbed].mean() < cosine_SDN[undisturbed].mean() - 0.1


def test_a_cached_bank_is_the_one_that_was_saved(bank: SupportBank, tmp_path: Path) -> None:
    cache = BankCache(tmp_path / "banks")
    assert cache.load(bank.spec) is None
    cache.save(bank)
    cached = cache.load(bank.spec)
    assert cached is not None
    assert cached.guidance.names == bank.guidance.names
    assert cached.nbytes == bank.nbytes
    for strength, tokens in bank.noisy_SDNE.items():
        assert torch.equal(cached.noisy_SDNE[strength], tokens)
    for layer, tokens in bank.support.layers.items():
        assert torch.equal(cached.support.layers[layer], tokens)
    assert cached.selection is not None
    assert bank.selection is not None
    assert torch.equal(cached.selection.labels_FSDN, bank.selection.labels_FSDN)
    assert torch.equal(cached.noisy_views_SD, bank.noisy_views_SD)
    assert torch.equal(cached.objects_SN, bank.objects_SN)
    assert cached.spec == bank.spec
    assert torch.equal(cached.judged_clean_SVNE, bank.judged_clean_SVNE)


def test_a_damaged_bank_counts_as_none_and_a_full_disk_does_no_harm(
    bank: SupportBank, tmp_path: Path
) -> None:
    cache = BankCache(tmp_path)
    cache.save(bank)
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[:-5000] + bytes(5000)):
        file.write_bytes(damaged)
        assert cache.load(bank.spec) is None
    for folder in (Path("/proc/none"), file):
        BankCache(folder).save(bank)
    with full_disk(1000):
        BankCache(tmp_path / "new").save(bank)
    assert list((tmp_path / "new").iterdir()) == []


def test_banks_used_least_recently_make_room(bank: SupportBank, tmp_path: Path) -> None:
    cache = BankCache(tmp_path, limit_bytes=int(2.5 * bank.nbytes))
    banks = [replace(bank, spec=bank.spec.model_copy(update={"seed": seed})) for seed in range(3)]
    for age, one in enumerate(banks[:2]):
        cache.save(one)
        os.utime(tmp_path / f"{one.spec.digest}.safetensors", (1000 + age, 1000 + age))
    assert cache.load(banks[0].spec) is not None
    cache.save(banks[2])
    assert [cache.load(one.spec) is not None for one in banks] == [True, False, True]


def test_a_bank_under_the_name_of_another_counts_as_none(bank: SupportBank, tmp_path: Path) -> None:
    cache = BankCache(tmp_path)
    cache.save(bank)
    (file,) = tmp_path.glob("*.safetensors")
    other = bank.spec.model_copy(update={"seed": 7})
    file.rename(file.with_stem(other.digest))
    assert cache.load(other) is None
