"""What each lane sees in a step: noisy draws and clean views of its own support images.

T lanes, P prompts (0 normal, the others anomalous), L longest context, C token width, B images a
step, N patch tokens, E joint width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from apt_ray.anomalies.noise import add_token_noise
from apt_ray.prompts.lanes import Lane

_NOISY = 4


_CLEAN = 4


def draw_batches(
    lanes: Sequence[Lane], generators: Sequence[torch.Generator], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each lane's next images, noisy draws, then clean views: tokens `(T, B, N, E)`, float32, and
    labels `(T, B, N)`, 1 anomalous, 0 normal, -1 ignored.

    Lanes that read the same tensors are copied together: on a GPU a copy for each lane would cost
    more than all of the step's arithmetic.
    """
    draws = [_draw(lane, g) for lane, g in zip(lanes, generators, strict=True)]
    clean_SVNE, labels_SDN = lanes[0].bank.clean_SVNE, lanes[0].bank.noisy_labels_SDN
    shape_TBNE = (len(lanes), _NOISY + _CLEAN, *clean_SVNE.shape[2:])
    tokens_TBNE = clean_SVNE.new_empty(shape_TBNE, device=device)
    labels_TBN = labels_SDN.new_zeros(shape_TBNE[:3], device=device)
    readers: dict[tuple[int, float], list[int]] = {}
    for number, lane in enumerate(lanes):
        readers.setdefault((id(lane.bank), lane.settings.noise_strength), []).append(number)
    for (_, strength), numbers in readers.items():
        bank = lanes[numbers[0]].bank
        noisy_GB = torch.stack([draws[number].noisy_B for number in numbers])
        clean_GB = torch.stack([draws[number].clean_B for number in numbers])
        at_G = torch.tensor(numbers, device=device)
        tokens_TBNE[at_G, :_NOISY] = _rows(bank.noisy_SDNE[strength], noisy_GB).to(device)
        tokens_TBNE[at_G, _NOISY:] = _rows(bank.clean_SVNE, clean_GB).to(device)
        labels_TBN[at_G, :_NOISY] = _rows(bank.noisy_labels_SDN, noisy_GB).to(device)
    for number, (lane, g) in enumerate(zip(lanes, generators, strict=True)):
        if lane.settings.noise != "pixel":
            _disturb_tokens(lane, draws[number], g, tokens_TBNE[number], labels_TBN[number])
    return tokens_TBNE.float(), labels_TBN


@dataclass(frozen=True, slots=True)
class _Draw:
    """Which of the bank's noisy draws and clean views, counted over all of its images."""

    noisy_B: torch.Tensor
    clean_B: torch.Tensor


def _draw(lane: Lane, g: torch.Generator) -> _Draw:
    bank, images = lane.bank, torch.tensor(lane.images)
    draws, views = bank.noisy_labels_SDN.shape[1], bank.clean_SVNE.shape[1]
    image_B = images[torch.randint(len(images), (_NOISY + _CLEAN,), generator=g)]
    return _Draw(
        noisy_B=image_B[:_NOISY] * draws + torch.randint(draws, (_NOISY,), generator=g),
        clean_B=image_B[_NOISY:] * views + torch.randint(views, (_CLEAN,), generator=g),
    )


def _disturb_tokens(
    lane: Lane,
    draw: _Draw,
    g: torch.Generator,
    tokens_BNE: torch.Tensor,
    labels_BN: torch.Tensor,
) -> None:
    """Put noise on tokens in place of noisy pixels: of all noisy draws, or of every other one."""
    bank, settings = lane.bank, lane.settings
    views = bank.clean_SVNE.shape[1]
    view_B = _rows(bank.noisy_views_SD, draw.noisy_B).cpu()
    image_B = draw.noisy_B // bank.noisy_labels_SDN.shape[1]
    undisturbed_BNE = _rows(bank.clean_SVNE, image_B * views + view_B).to(tokens_BNE.device)
    is_chosen_BN = labels_BN[:_NOISY] == 1
    on_tokens_BNE = add_token_noise(undisturbed_BNE, is_chosen_BN, settings.noise_strength, g)
    step = 2 if settings.noise == "mixed" else 1
    tokens_BNE[:_NOISY:step] = on_tokens_BNE[::step]


def _rows(values_SX: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Rows of the tensor whose first two axes are one, `(*row.shape, ...)`; whole rows are copied,
    not one number after another."""
    flat = values_SX.flatten(0, 1)
    picked: torch.Tensor = flat.index_select(0, row.flatten().to(flat.device))
    return picked.reshape(*row.shape, *flat.shape[1:])
