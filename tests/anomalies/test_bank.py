import pickle
from typing import Any

import numpy as np
import torch
from PIL import Image

from apt_ray.anomalies.bank import DRAWS, GUIDANCE_DRAWS, SupportBank, encode_support
from apt_ray.anomalies.families import GUIDANCE
from apt_ray.data.folders import Category
from apt_ray.features.clip import FrozenCLIP
from apt_ray.images import read_image
from tests.fakes import bank_spec


def test_a_bank_holds_every_draw_of_every_image(backbone: FrozenCLIP, bank: SupportBank) -> None:
    patches, width = backbone.grid[0] * backbone.grid[1], bank.clean_SVNE.shape[-1]
    assert bank.shots == 3
    assert set(bank.noisy_SDNE) == {0.1, 0.3}
    assert bank.noisy_SDNE[0.1].shape == (3, DRAWS, patches, width)
    assert bank.noisy_labels_SDN.shape == (3, DRAWS, patches)
    assert bank.guidance.names == tuple(GUIDANCE)
    assert bank.guidance.tokens_FSDNE.shape == (5, 3, GUIDANCE_DRAWS, patches, width)


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
    assert torch.equal(first.guidance.tokens_FSDNE, second.guidance.tokens_FSDNE)
    done, total = seen[-1]
    assert done == total


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

    bank = encoded()
    assert 0.15 < bank.objects_SN.float().mean() < 0.45
    off_part_N = ~bank.objects_SN[0]
    # The disk lies in the middle, so its mirror images do too.
    labels_DN = bank.noisy_labels_SDN[0][:, off_part_N]
    assert (labels_DN == 0).float().mean() > 0.97
    assert (bank.noisy_labels_SDN == 1).any()

    whole = encoded(region="everywhere")
    on_part = bank.objects_SN[0]
    assert (whole.noisy_labels_SDN[0][:, on_part] == 1).float().mean() > 0.8

    unmasked = encoded(object_mask=False)
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
