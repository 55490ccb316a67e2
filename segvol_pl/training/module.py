"""What both tasks share: optimizer, learning-rate schedule, gradient clipping, metrics per step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from segvol_pl.config import DecayShape, OptimConfig, Schedule
from segvol_pl.data.batch import Batch
from segvol_pl.training.averages import exchange, keep_averages
from segvol_pl.training.graph import StepGraph
from segvol_pl.training.parameter_groups import parameter_groups


def schedule(step: int, config: OptimConfig) -> float:
    """Factor on `optim.lr` at `step`: linear warm-up, then `optim.schedule`; 0 at `max_steps`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    wsd = config.schedule is Schedule.wsd
    begins = config.decay_start if wsd else config.warmup_steps
    decayed = min(1.0, max(0, step - begins) / max(1, config.max_steps - begins))
    if wsd and config.decay_shape is DecayShape.sqrt:
        return 1 - math.sqrt(decayed)
    if wsd and config.decay_shape is DecayShape.linear:
        return 1 - decayed
    return 0.5 * (1 + math.cos(math.pi * decayed))


class StepMeans:
    """Log a step's metrics as means over its micro-batches and all ranks. The first step has number 1.

    Steps that are not logged cost no communication and no GPU synchronisation. Lightning's own `module.log` costs tens
    of milliseconds for a dozen metrics.
    """

    def __init__(self) -> None:
        self.micro: list[Tensor] = []
        self.latest: dict[str, float] = {}

    def log(self, module: pl.LightningModule, metrics: dict[str, Tensor]) -> None:
        """Add the metrics, () each, of a micro-batch; log after the step's last one."""
        step = module.global_step + 1
        if step % module.trainer.log_every_n_steps:  # type: ignore[attr-defined]  # set by its logger connector
            return
        self.micro.append(torch.stack([value.float() for value in metrics.values()]))
        if len(self.micro) < module.trainer.accumulate_grad_batches:
            return
        means = module.trainer.strategy.reduce(torch.stack(self.micro).mean(0), reduce_op="mean")
        self.micro = []
        scheduler = module.lr_schedulers()
        assert isinstance(means, Tensor) and isinstance(scheduler, LambdaLR)
        self.latest = dict(zip(metrics, means.tolist(), strict=True)) | {"lr": scheduler.get_last_lr()[0]}
        for logger in module.loggers:
            logger.log_metrics({f"train/{name}": value for name, value in self.latest.items()}, step=step)


def poisoned(loss: Tensor) -> Tensor:
    """The loss; if it is not finite, one whose gradients are all NaN, so that all ranks see it in the gradient norm."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def log_validation(module: pl.LightningModule, metrics: dict[str, Tensor], batch: Batch) -> None:
    """Log a validation batch's metrics, () each, averaged over batches and ranks, at the current step."""
    named = {f"val/{name}": value for name, value in metrics.items()}
    named["step"] = torch.tensor(float(module.global_step), device=module.device)
    module.log_dict(named, sync_dist=True, batch_size=len(batch["image_BCDHW"]))


@dataclass(frozen=True)
class Sharding:
    """How the ranks hold a task's weights; a strategy's attribute `sharding`. The default: all of them on each rank."""

    weights_resident: bool = True
    """Whether each rank holds the complete weights at all times; otherwise only while a block computes."""
    shard: Callable[[pl.LightningModule], None] = lambda module: None
    """Splits the weights over the ranks. May be called more than once."""
    gather: Callable[[], None] = lambda: None
    """Makes the decoder's weights complete before it computes, where torch does not do so itself."""
    use_averages: Callable[[Any], None] = exchange
    """Puts the averages that an optimizer holds (`optim.ema`) in the place of the weights."""
    use_weights: Callable[[Any], None] = exchange
    """Puts the weights back."""


class Task(pl.LightningModule):
    """What both tasks share. Subclasses set `optim`; `sharding` is that of the run's strategy."""

    optim: OptimConfig

    def __init__(self) -> None:
        super().__init__()
        self.means = StepMeans()
        self.sharding = Sharding()
        self.rates: dict[str, float] = {}
        """Name of a weight -> factor on its learning rate, see `model.transfer`; 1 if it is not named."""
        self.step_norm: Tensor | None = None
        """Norm of the last step's gradients before clipping, (); None under DeepSpeed, which computes its own."""
        self.volume_losses_B: Tensor | None = None
        """The loss of each volume of the last validated batch, (B,); their mean is its loss."""
        self.graph: StepGraph | None = None
        """Computes losses and gradients of a step as one recorded CUDA graph, if set."""

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss to minimise, (), and its parts by name."""
        raise NotImplementedError

    def step_losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the same for a training step, which may be recorded."""
        return self.losses(batch) if self.graph is None else self.graph(batch)

    def on_validation_start(self) -> None:
        """Free the memory that a recorded step holds."""
        if self.graph is not None:
            self.graph.release()

    def configure_model(self) -> None:
        """Split the weights. Lightning calls this before each validation, training and test."""
        self.sharding.shard(self)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        if not gradients:  # held by DeepSpeed, which clips and skips steps itself
            return
        norm = nn.utils.get_total_norm(gradients)
        # Lightning refuses to clip with a fused optimizer under autocast, because of loss scaling. bf16 needs none.
        if gradient_clip_val:
            nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, norm)
        # Of gradients that are split over the ranks, the norm over all of them.
        self.step_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # With found_inf set, a fused AdamW keeps its weights, moments and step count.
        optimizer.found_inf = (~self.step_norm.isfinite()).float()

    def configure_optimizers(self) -> Any:
        adamw, scheduler = optimizer(self, self.optim)
        return {"optimizer": adamw, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def optimizer(module: nn.Module, config: OptimConfig) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW over the module's parameters that require a gradient, and its schedule per step."""
    groups, (beta1, beta2) = parameter_groups(module, config), config.betas
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(beta1, beta2), weight_decay=config.weight_decay, fused=True)
    if config.ema:
        keep_averages(adamw, config.ema)
    return adamw, LambdaLR(adamw, lambda step: schedule(step, config))
