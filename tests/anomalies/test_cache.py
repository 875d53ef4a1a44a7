import os
from dataclasses import replace
from pathlib import Path

import torch

from apt_ray.anomalies.bank import SupportBank
from apt_ray.anomalies.cache import EncodedCache
from apt_ray.anomalies.spec import BankSpec
from apt_ray.validation.judge import Judge
from tests.disks import full_disk


def bank_cache(folder: Path, *, limit_bytes: int = 2**30) -> EncodedCache[BankSpec, SupportBank]:
    return EncodedCache(folder, SupportBank.restore, limit_bytes=limit_bytes)


def test_a_cached_bank_is_the_one_that_was_saved(bank: SupportBank, tmp_path: Path) -> None:
    cache = bank_cache(tmp_path / "banks")
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
    assert torch.equal(cached.guidance.labels_FSDN, bank.guidance.labels_FSDN)
    assert torch.equal(cached.noisy_views_SD, bank.noisy_views_SD)
    assert torch.equal(cached.objects_SN, bank.objects_SN)
    assert cached.spec == bank.spec


def test_a_cached_judge_is_the_one_that_was_saved(judge: Judge, tmp_path: Path) -> None:
    cache = EncodedCache(tmp_path, Judge.restore)
    assert cache.load(judge.spec) is None
    cache.save(judge)
    cached = cache.load(judge.spec)
    assert cached is not None
    assert (cached.spec, cached.families) == (judge.spec, judge.families)
    assert (cached.smallest, cached.widened) == (judge.smallest, judge.widened)
    assert cached.nbytes == judge.nbytes
    for name, tensor in judge.tensors().items():
        assert torch.equal(cached.tensors()[name], tensor)


def test_a_damaged_bank_counts_as_none_and_a_full_disk_does_no_harm(
    bank: SupportBank, tmp_path: Path
) -> None:
    cache = bank_cache(tmp_path)
    cache.save(bank)
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[:-5000] + bytes(5000)):
        file.write_bytes(damaged)
        assert cache.load(bank.spec) is None
    for folder in (Path("/proc/none"), file):
        bank_cache(folder).save(bank)
    with full_disk(1000):
        bank_cache(tmp_path / "new").save(bank)
    assert list((tmp_path / "new").iterdir()) == []


def test_banks_used_least_recently_make_room(bank: SupportBank, tmp_path: Path) -> None:
    cache = bank_cache(tmp_path, limit_bytes=int(2.5 * bank.nbytes))
    banks = [replace(bank, spec=bank.spec.model_copy(update={"seed": seed})) for seed in range(3)]
    for age, one in enumerate(banks[:2]):
        cache.save(one)
        os.utime(tmp_path / f"{one.spec.digest}.safetensors", (1000 + age, 1000 + age))
    assert cache.load(banks[0].spec) is not None
    cache.save(banks[2])
    assert [cache.load(one.spec) is not None for one in banks] == [True, False, True]


def test_a_bank_under_the_name_of_another_counts_as_none(bank: SupportBank, tmp_path: Path) -> None:
    cache = bank_cache(tmp_path)
    cache.save(bank)
    (file,) = tmp_path.glob("*.safetensors")
    other = bank.spec.model_copy(update={"seed": 7})
    file.rename(file.with_stem(other.digest))
    assert cache.load(other) is None
