import torch

from apt_ray.features.attention import locality_mask, run_blocks


def test_the_mask_lets_a_patch_see_its_neighbours_and_the_cls_token() -> None:
    mask_SS = locality_mask((3, 4), radius=1)
    sees = mask_SS == 0
    assert sees[0].all(), "the CLS token sees everything"
    assert sees[:, 0].all(), "everything sees the CLS token"
    corner = sees[1, 1:].reshape(3, 4)
    assert corner.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    middle = sees[1 + 5, 1:].reshape(3, 4)  # row 1, column 1
    assert middle[:, :3].all()
    assert not middle[:, 3].any()


def test_the_cls_token_never_meets_a_windowed_patch() -> None:
    """Blocks that write the mean of what a token attends to: the windowed mean differs."""

    def block(x_BSD: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        mask_SS = torch.zeros(x_BSD.shape[1], x_BSD.shape[1]) if attn_mask is None else attn_mask
        mean: torch.Tensor = mask_SS.softmax(-1) @ x_BSD
        return mean

    x_BSD = torch.randn(2, 1 + 16, 3, generator=torch.Generator().manual_seed(0))
    mask_SS = locality_mask((4, 4), radius=1)
    windowed_BSD, _ = run_blocks([block] * 3, x_BSD, mask_SS=mask_SS, local_blocks=2)
    ordinary_BSD, _ = run_blocks([block] * 3, x_BSD, mask_SS=mask_SS, local_blocks=0)
    assert torch.allclose(windowed_BSD[:, 0], ordinary_BSD[:, 0])
    assert torch.allclose(windowed_BSD[:, 1:], ordinary_BSD[:, 1:], atol=1e-6)
    once_BSD, _ = run_blocks([block], x_BSD, mask_SS=mask_SS, local_blocks=1)
    assert not torch.allclose(once_BSD[:, 1:], block(x_BSD)[:, 1:], atol=1e-3)
