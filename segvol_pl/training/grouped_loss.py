"""The loss of many prompts, group by group, in the memory of one group.

1. A term gives a group's loss, and of each of its prompts Dice loss and BCE.
2. Where this process holds whole weights, a group's gradients are taken as soon as its loss is known, still in the
   forward pass, and its activations are gone: nothing is computed twice. The loss is a plain sum over the groups, so
   the backward pass has only to scale what was gathered.
3. Where weights are there only while their module computes (FSDP, ZeRO-3), that cannot be: there each group is
   computed again in the backward pass.

Letters: B images, P prompts of one image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Term = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""term(group, *inputs) -> loss (), dice_BP, bce_BP of the prompts in the slice `group`."""


def sum_over_groups(
    term: Term, groups: Sequence[slice], inputs: Sequence[Tensor], weights: Sequence[Tensor], whole: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the groups' losses, and dice_BP and bce_BP, detached, of all prompts.

    inputs: what the term is given; weights: whatever else it depends on that trains; whole: whether this process holds
    whole weights, see above.
    """
    if whole and torch.is_grad_enabled():
        loss, dice_BP, bce_BP = EagerGradSum.apply(term, groups, len(inputs), *inputs, *weights)
        return loss, dice_BP, bce_BP
    again = torch.is_grad_enabled() and len(groups) > 1
    # Nothing in a term is random: the generators' states need not be kept.
    once = functools.partial(checkpoint, term, use_reentrant=False, preserve_rng_state=False) if again else term
    found = [once(group, *inputs) for group in groups]
    losses, dice, bce = zip(*found, strict=True)
    return torch.stack(losses).sum(), torch.cat(dice, 1).detach(), torch.cat(bce, 1).detach()


class EagerGradSum(torch.autograd.Function):
    """Step 2 of the module's story: the gradients are taken in the forward pass, group by group, and kept."""

    @staticmethod
    def forward(ctx: Any, term: Term, groups: Sequence[slice], count: int, *tensors: Tensor) -> Any:
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
        """The kept gradients, times the gradient of the loss."""
        # All in one operation, of which a GPU makes a few launches.
        scaled = iter(torch._foreach_mul([grad for grad in ctx.saved_tensors if grad is not None], grad_loss))
        return None, None, None, *(None if grad is None else next(scaled) for grad in ctx.saved_tensors)


def _gather(loss: Tensor, sources: list[Tensor], gathered: list[Tensor | None]) -> None:
    """Adds the loss's gradients to `gathered`."""
    trained = [place for place, source in enumerate(sources) if source.requires_grad]
    # Autocast is for the forward pass alone: it would also round the products of what was computed in float32.
    with torch.autocast(loss.device.type, enabled=False):
        gradients = torch.autograd.grad(loss, [sources[place] for place in trained], allow_unused=True)
    for place, gradient in zip(trained, gradients, strict=True):
        so_far = gathered[place]
        gathered[place] = gradient if so_far is None or gradient is None else so_far.add_(gradient)
