"""The losses against plain formulas, one prompt at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segvol_pl.training.grouped_loss import Group, sum_over_groups
from segvol_pl.training.losses import mask_losses, simmim_loss

WEIGHT = 1 / 6
"""Of a prompt in a step's loss: no power of two, so that bf16 rounds it."""


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


def _saturated(size: float, share: float) -> tuple[Tensor, Tensor]:
    """logits_BKPDHW of +-size, as late in training, and the masks_BKDHW that they all but give."""
    masks = torch.rand(1, 1, 32, 64, 64, generator=torch.Generator().manual_seed(0)) < share
    return torch.where(masks, size, -size)[:, :, None], masks


def _exact(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dice loss, BCE and the gradient of their weighted sum, in float64."""
    exact, truth = logits.double().requires_grad_(), masks[:, :, None].double()
    bce = F.binary_cross_entropy_with_logits(exact, truth, reduction="none").mean((3, 4, 5))
    overlap, both = (exact.sigmoid() * truth).sum((3, 4, 5)), exact.sigmoid().sum((3, 4, 5)) + truth.sum((3, 4, 5))
    dice = 1 - 2 * overlap / (both + 1)
    (gradient,) = torch.autograd.grad((WEIGHT * (dice + bce)).sum(), exact)
    return dice.detach(), bce.detach(), gradient


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("share", [0.0003, 0.003, 0.05, 0.4])
@pytest.mark.parametrize("size", [6.0, 8.0, 12.0, 30.0])
def test_bf16_rounds_neither_the_losses_nor_their_gradients(size: float, share: float, whole: bool) -> None:
    """As a step takes them: within the forward pass, or after it where weights are split over ranks."""
    logits, masks = _saturated(size, share)
    logits.requires_grad_()

    def term(group: slice, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dice, bce = mask_losses(logits, masks)
        return (WEIGHT * (dice + bce)).sum(), dice, bce

    with torch.autocast("cpu", torch.bfloat16):
        loss, dice, bce = sum_over_groups(term, [Group(slice(0, 1))], [logits], [], whole)
    (gradient,) = torch.autograd.grad(loss, logits)
    exact_dice, exact_bce, exact_gradient = _exact(logits.detach(), masks)
    torch.testing.assert_close(dice.double(), exact_dice, rtol=0, atol=1e-5)
    torch.testing.assert_close(bce.double(), exact_bce, rtol=0, atol=1e-5)
    # BCE alone moves a voxel by up to WEIGHT / voxels; that is the measure, since float32 rounds 1 - sigmoid itself.
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-4 * WEIGHT / masks.numel())


def test_float32_losses_are_those_of_the_plain_products() -> None:
    """To the bit: nothing but autocast is turned off."""
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(2, 3, 4, 5, 6, 7, generator=generator)).requires_grad_()
    masks = torch.rand(2, 3, 5, 6, 7, generator=generator) > 0.7
    flat, truth = logits.flatten(3), masks.float().flatten(2)[:, :, None]
    overlap_logits = (flat @ truth.transpose(2, 3))[..., 0]
    bce = (F.softplus(flat).sum(-1) - overlap_logits) / flat.shape[-1]
    probability = flat.sigmoid()
    overlap = (probability @ truth.transpose(2, 3))[..., 0]
    dice = 1 - 2 * overlap / (probability.sum(-1) + truth.sum(-1) + 1)
    found_dice, found_bce = mask_losses(logits, masks)
    assert torch.equal(found_dice, dice) and torch.equal(found_bce, bce)
    (found,), (wanted,) = (torch.autograd.grad(loss.sum(), logits) for loss in (found_dice + found_bce, dice + bce))
    assert torch.equal(found, wanted)


def test_simmim_is_the_mean_absolute_error() -> None:
    predicted, patches = torch.rand(2, 5, 8), torch.rand(2, 5, 8)
    assert torch.isclose(simmim_loss(predicted, patches), (predicted - patches).abs().sum() / 80)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(simmim_loss(predicted, patches), F.l1_loss(predicted, patches))
