"""What each lane sees in a step: noisy draws and clean views of its own support images.

T lanes, P prompts (0 normal, the others anomalous), L longest context, C token width, B images a
step, N patch tokens, E joint width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

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

    Neighbours that read the same tensors are copied together: on a GPU a copy for each lane would
    cost more than all of the step's arithmetic.
    """
    draws = [_draw(lane, g) for lane, g in zip(lanes, generators, strict=True)]
    bank = lanes[0].bank
    shape_TBNE = (len(lanes), _NOISY + _CLEAN, *bank.clean_SVNE.shape[2:])
    tokens_TBNE = torch.empty(shape_TBNE, device=device)
    labels_TBN = bank.noisy_labels_SDN.new_zeros(shape_TBNE[:3], device=device)
    for (_, strength), alike in groupby(range(len(lanes)), lambda number: _read_by(lanes[number])):
        first, *others = alike
        group, bank = slice(first, first + 1 + len(others)), lanes[first].bank
        noisy_GB = torch.tensor([draw.noisy for draw in draws[group]])
        clean_GB = torch.tensor([draw.clean for draw in draws[group]])
        tokens_TBNE[group, :_NOISY] = _rows(bank.noisy_SDNE[strength], noisy_GB)
        tokens_TBNE[group, _NOISY:] = _rows(bank.clean_SVNE, clean_GB)
        labels_TBN[group, :_NOISY] = _rows(bank.noisy_labels_SDN, noisy_GB)
    for number, (lane, g) in enumerate(zip(lanes, generators, strict=True)):
        if lane.settings.noise != "pixel":
            _disturb_tokens(lane, draws[number], g, tokens_TBNE[number], labels_TBN[number])
    return tokens_TBNE, labels_TBN


def _read_by(lane: Lane) -> tuple[int, float]:
    """Which tensors a lane reads."""
    return id(lane.bank), lane.settings.noise_strength


@dataclass(frozen=True, slots=True)
class _Draw:
    """Which of the bank's noisy draws and clean views, counted over all of its images."""

    noisy: list[int]
    clean: list[int]


def _draw(lane: Lane, g: torch.Generator) -> _Draw:
    def chosen(count: int, among: int) -> list[int]:
        numbers: list[int] = torch.randint(among, (count,), generator=g).tolist()
        return numbers

    draws, views = lane.bank.noisy_labels_SDN.shape[1], lane.bank.clean_SVNE.shape[1]
    images = [lane.images[number] for number in chosen(_NOISY + _CLEAN, len(lane.images))]
    return _Draw(
        noisy=[i * draws + n for i, n in zip(images[:_NOISY], chosen(_NOISY, draws), strict=True)],
        clean=[i * views + n for i, n in zip(images[_NOISY:], chosen(_CLEAN, views), strict=True)],
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
    noisy_B = torch.tensor(draw.noisy)
    view_B = _rows(bank.noisy_views_SD, noisy_B).cpu()
    image_B = noisy_B // bank.noisy_labels_SDN.shape[1]
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
