"""The losses against plain formulas, one prompt at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from segvol_pl.losses import mask_losses, simmim_loss


def test_dice_and_bce_equal_the_papers_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 6, 7, generator=generator)
    masks = torch.rand(2, 3, 5, 6, 7, generator=generator) > 0.7
    dice, bce = mask_losses(logits, masks)
    for b, k, p in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)):
        one, truth = logits[b, k, p], masks[b, k].float()
        overlap = 2 * (one.sigmoid() * truth).sum()
        assert torch.isclose(dice[b, k, p], 1 - overlap / (one.sigmoid().sum() + truth.sum() + 1), atol=1e-6)
        assert torch.isclose(bce[b, k, p], F.binary_cross_entropy_with_logits(one, truth), atol=1e-6)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([-300.0, 300.0]).view(1, 1, 1, 1, 1, 2).requires_grad_()
    dice, bce = mask_losses(logits, torch.tensor([1, 0]).view(1, 1, 1, 1, 2))
    (dice + bce).sum().backward()
    assert torch.isfinite(dice).all() and torch.isfinite(bce).all() and torch.isfinite(logits.grad).all()  # type: ignore[arg-type]


def test_simmim_is_the_mean_absolute_error() -> None:
    predicted, patches = torch.rand(2, 5, 8), torch.rand(2, 5, 8)
    assert torch.isclose(simmim_loss(predicted, patches), (predicted - patches).abs().sum() / 80)
