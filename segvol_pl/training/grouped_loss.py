"""The loss of many prompts, group by group, in the memory of one group.

1. A term computes a group's loss, and the Dice loss and BCE of each of its prompts.
2. If this process holds the complete weights, a group's gradients are computed right after its loss, in the forward
   pass, and its activations are freed: nothing is computed twice. The loss is a sum over the groups, so the backward
   pass only scales the accumulated gradients.
3. If weights exist only while their module computes (FSDP, ZeRO-3), this is impossible: each group is recomputed in
   the backward pass.

Letters: B images, P prompts of one image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Term = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""term(group, *inputs) -> loss (), dice_BP, bce_BP of a group's prompts."""


@dataclass(frozen=True)
class Group:
    """Prompts of each volume that are decoded together."""

    prompts: slice
    asked: int = 0
    """0: first answers. From 1: the round of corrections, whose prompts depend on the answers of the round before."""


def sum_over_groups(
    term: Term, groups: Sequence[Group], inputs: Sequence[Tensor], weights: Sequence[Tensor], resident: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the losses of the groups.

    Args:
        term: computes the loss of a group.
        groups: computed in this order.
        inputs: tensors that are passed to the term.
        weights: all trained parameters that the term uses besides.
        resident: whether this process holds the complete weights at all times, see above.

    Returns:
        The summed loss (), and the detached dice_BP and bce_BP of all prompts.
    """
    if resident and torch.is_grad_enabled():
        loss, dice_BP, bce_BP = EagerGradSum.apply(term, groups, len(inputs), *inputs, *weights)  # type: ignore[no-untyped-call]
        return loss, dice_BP, bce_BP
    again = torch.is_grad_enabled() and len(groups) > 1
    # A term is not random: random states need not be saved.
    once = functools.partial(checkpoint, term, use_reentrant=False, preserve_rng_state=False) if again else term
    found = [once(group, *inputs) for group in groups]
    losses, dice, bce = zip(*found, strict=True)
    return torch.stack(losses).sum(), torch.cat(dice, 1).detach(), torch.cat(bce, 1).detach()


class EagerGradSum(torch.autograd.Function):
    """Way 2 of the module's docstring: gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, term: Term, groups: Sequence[Group], count: int, *tensors: Tensor) -> Any:
        """The sum of the losses, with the Dice and cross-entropy of every prompt (B,P)."""
        inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors[:count]]
        sources = [*inputs, *tensors[count:]]
        gathered: list[Tensor | None] = [None] * len(sources)
        found = []
        for group in groups:
            with torch.enable_grad():
                loss, dice_BP, bce_BP = term(group, *inputs)
            _gather(loss, sources, gathered)
            found.append((loss.detach(), dice_BP.detach(), bce_BP.detach()))
        losses, dice, bce = zip(*found, strict=True)
        parts = torch.cat(dice, 1), torch.cat(bce, 1)
        ctx.save_for_backward(*gathered)
        ctx.mark_non_differentiable(*parts)
        return torch.stack(losses).sum(), *parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> Any:
        """Scale the stored gradients by the gradient of the loss."""
        return None, None, None, *scaled(ctx.saved_tensors, grad_loss)


def scaled(gradients: Sequence[Tensor | None], factor: Tensor) -> list[Tensor | None]:
    """The gradients times a factor (), by one fused operation: a few kernel launches on a GPU. None stays None."""
    products = iter(torch._foreach_mul([grad for grad in gradients if grad is not None], factor))
    return [None if grad is None else next(products) for grad in gradients]


def _gather(loss: Tensor, sources: list[Tensor], gathered: list[Tensor | None]) -> None:
    """Add the gradients of the loss to `gathered`."""
    trained = [place for place, source in enumerate(sources) if source.requires_grad]
    # Autocast belongs to the forward pass only: here it would also round products of float32 operations to bf16.
    with torch.autocast(loss.device.type, enabled=False):
        gradients = torch.autograd.grad(loss, [sources[place] for place in trained], allow_unused=True)
    for place, gradient in zip(trained, gradients, strict=True):
        so_far = gathered[place]
        gathered[place] = gradient if so_far is None or gradient is None else so_far.add_(gradient)
