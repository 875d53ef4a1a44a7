"""What prompts learn from: noise inside a region, and which patches it makes anomalous.

B images, H, W pixels, N patches. Pixels are float32 in 0..1.
"""

import torch
import torch.nn.functional as F

ANOMALOUS_COVERAGE = 0.25
"""A patch is anomalous if at least this share of it is covered, and ignored if less of it is."""


IGNORED = -1


def patch_labels(mask_BHW: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Masks -> `(B, N)` int8: 1 anomalous, 0 normal, -1 ignored (touched, but too little)."""
    coverage_BN = F.adaptive_avg_pool2d(mask_BHW.float()[:, None], grid).flatten(1)
    labels_BN = torch.where(coverage_BN > 0, IGNORED, 0)
    return labels_BN.masked_fill(coverage_BN >= ANOMALOUS_COVERAGE, 1).to(torch.int8)


def add_noise(
    pixels_B3HW: torch.Tensor, mask_BHW: torch.Tensor, noise_B3HW: torch.Tensor, strength: float
) -> torch.Tensor:
    """Pixels with `strength` times the unit noise added inside the mask, clamped to 0..1."""
    noisy_B3HW = pixels_B3HW + strength * noise_B3HW * mask_BHW[:, None]
    return keep_gray(pixels_B3HW, noisy_B3HW.clamp(0, 1))


def keep_gray(pixels_B3HW: torch.Tensor, replacement_B3HW: torch.Tensor) -> torch.Tensor:
    """The replacement, gray where the image is gray: else colour alone would give it away."""
    spread_B = (pixels_B3HW.amax(1) - pixels_B3HW.amin(1)).flatten(1).amax(1)
    is_gray_B111 = (spread_B < 0.01)[:, None, None, None]
    return torch.where(is_gray_B111, replacement_B3HW.mean(1, keepdim=True), replacement_B3HW)


def add_token_noise(
    tokens_BNE: torch.Tensor, chosen_BN: torch.Tensor, strength: float, g: torch.Generator
) -> torch.Tensor:
    """Chosen tokens of unit length plus noise of about `strength` times their length, again of
    unit length."""
    noise_BNE = torch.randn(tokens_BNE.shape, generator=g).to(tokens_BNE.device)
    noise_BNE = noise_BNE / tokens_BNE.shape[-1] ** 0.5
    noisy_BNE = tokens_BNE + strength * chosen_BN[..., None] * noise_BNE
    return F.normalize(noisy_BNE, dim=-1).to(tokens_BNE.dtype)
