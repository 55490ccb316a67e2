"""DeepSpeed's ZeRO as a strategy for Lightning. Imported only by a run that chooses zero1, zero2 or zero3.

1. It also runs on CPU ranks, so that a run can be rehearsed without GPUs; Lightning's own strategy requires CUDA.
2. Weights stay float32 and autocast computes in bf16, as under every other strategy.
3. Checkpoints are complete and have the same form as those of every other strategy: a run can continue under another.

DeepSpeed documents neither how it stores AdamW's moments nor when it creates them. The private names used here are
listed and tested in `tests/training/test_internals.py`.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch.nn import Parameter
from torch.optim import Optimizer

from segvol_pl.config import DEEPSPEED_BUCKET, RunConfig
from segvol_pl.device import uses_bf16
from segvol_pl.model.checkpoint import EMA
from segvol_pl.training.checkpoints import save_together
from segvol_pl.training.module import Sharding, Task
from segvol_pl.training.parameter_groups import parameter_groups

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's names of its moments."""


class ZeRO(DeepSpeedStrategy):
    """Split optimizer state (stage 1), gradients too (2), and weights too (3) over the ranks.

    Args:
        run: the run's configuration.
        stage: 1, 2 or 3.
        backend: `nccl`, or `gloo` for CPU ranks.
        timeout: how long ranks wait for each other.
    """

    def __init__(self, run: RunConfig, stage: int, backend: str, timeout: timedelta) -> None:
        self.on_cpu, self.stage = backend == "gloo", stage
        self.sharding = Sharding(
            weights_resident=stage < 3,
            use_averages=lambda optimizer: self._put(EMA),
            use_weights=lambda optimizer: self._put(None),
        )
        if self.on_cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
        super().__init__(
            stage=stage,
            offload_optimizer=run.offload,
            allgather_bucket_size=DEEPSPEED_BUCKET,
            reduce_bucket_size=DEEPSPEED_BUCKET,
            logging_level=logging.WARNING,
            logging_batch_size_per_gpu=1,
            process_group_backend=backend,
            timeout=timeout,
        )
        assert isinstance(self.config, dict)
        # DeepSpeed's own CPU optimizer is compiled at the first start; nodes may have no compiler.
        self.config["zero_force_ds_cpu_optimizer"] = False
        mixed = uses_bf16(torch.device("cpu" if self.on_cpu else "cuda"), run.precision)
        self.config["torch_autocast"] = {"enabled": mixed, "dtype": "bfloat16"}

    def setup_environment(self) -> None:
        """Start the process group. Lightning's own method requires CUDA."""
        if self.on_cpu:
            DDPStrategy.setup_environment(self)
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        """Start DeepSpeed's process group. Lightning's own method refuses ranks that each see one GPU, as number 0."""
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _set_node_environment_variables(self) -> None:
        super()._set_node_environment_variables()
        if not self.on_cpu:
            # DeepSpeed uses it as the index of the device.
            os.environ["LOCAL_RANK"] = str(self.root_device.index)

    @property
    def root_device(self) -> torch.device:
        """The device that this rank computes on."""
        return torch.device("cpu", 0) if self.on_cpu else super().root_device

    def backward(self, closure_loss: torch.Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Any:
        """Run the backward pass. Lightning has already divided the loss by the micro-batches of a step."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning restores the optimizer: its state in the checkpoint is not in DeepSpeed's form."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather the complete weights, float32 on the CPU. All ranks call this together."""
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict()
        parameters = dict(self.lightning_module.named_parameters())
        return {name: _gathered(parameters[name]) if name in parameters else state[name] for name in state}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Gather the optimizer's state in the form of torch's AdamW, whose parameters are numbered."""
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        numbers = itertools.count()
        for group, members in zip(groups, self._groups(), strict=True):
            group["params"] = list(itertools.islice(numbers, len(members)))
        state: dict[int, dict[str, torch.Tensor]] = {}
        self._link(optimizer)
        # Empty before the first step.
        for adams in list(self._adam(optimizer).state.values())[:1]:
            kept = [key for key in (*MOMENTS, EMA) if key in adams]
            for i, parameter in enumerate(self._trained()):
                state[i] = {"step": adams["step"].clone(), **{key: _gathered(parameter, key) for key in kept}}
        return {"state": state, "param_groups": groups}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write the gathered state, instead of DeepSpeed's folder of one file per rank."""
        save_together(self, checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the complete checkpoint on every rank."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give each rank its share of the checkpoint's weights."""
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        assert self.lightning_module is not None
        tensors = checkpoint["state_dict"]
        for name, parameter in self.lightning_module.named_parameters():
            full = tensors[name].to(self.root_device)
            # Both copies: the one used to compute, and the optimizer's.
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
                parameter.data.copy_(full)
            if parameter.requires_grad:
                safe_set_full_fp32_param(parameter, full)
        for name, buffer in self.lightning_module.named_buffers():
            if name in tensors:
                buffer.copy_(tensors[name])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each rank its share of the checkpoint's moments."""
        from deepspeed.utils import safe_set_full_optimizer_state

        (optimizer,), (saved,) = self.optimizers, checkpoint["optimizer_states"]
        trained = self._trained()
        if saved["state"]:
            self._start_moments(optimizer, saved["state"][0])
        for i, state in saved["state"].items():
            for key in (key for key in state if key != "step"):
                safe_set_full_optimizer_state(trained[i], state[key].to(self.root_device), key)
        for group, before in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            group.update({key: value for key, value in before.items() if key != "params"})

    def _start_moments(self, optimizer: Any, like: dict[str, torch.Tensor]) -> None:
        """Create AdamW's state, which otherwise exists only after the first step. like: the saved one of a weight."""
        zero = getattr(optimizer, "_optimizer", optimizer)
        flat = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for partition in flat:
            kept = {key: torch.zeros_like(partition, requires_grad=False) for key in like if key != "step"}
            # A fused AdamW keeps its step count on the device.
            zero.optimizer.state[partition] = {"step": like["step"].to(partition.device, copy=True), **kept}
        self._link(optimizer)

    def _link(self, optimizer: Any) -> None:
        """Let DeepSpeed find the state of each weight. It looks once, when only the first group has had a step."""
        zero = getattr(optimizer, "_optimizer", optimizer)
        if self.stage < 3 and zero.optimizer.state:
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _put(self, moment: str | None) -> None:
        """Put the averages, or the optimizer's own copy of the weights, in the place of the weights."""
        import deepspeed

        (optimizer,) = self.optimizers
        self._link(optimizer)
        if not any(EMA in state for state in self._adam(optimizer).state.values()):
            return
        for parameter in self._trained():
            full = _full(parameter, moment)
            with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], 0, enabled=self.stage == 3):
                parameter.copy_(full)

    def _groups(self) -> list[list[Parameter]]:
        """The trained weights in the optimizer's groups, whose own members are DeepSpeed's partitions."""
        assert isinstance(self.lightning_module, Task)
        return [group["params"] for group in parameter_groups(self.lightning_module, self.lightning_module.optim)]

    def _trained(self) -> list[Parameter]:
        """The trained weights as the optimizer numbers them."""
        return list(itertools.chain.from_iterable(self._groups()))

    def _adam(self, optimizer: Any) -> Optimizer:
        """The AdamW that DeepSpeed's optimizer wraps."""
        adam: Optimizer = getattr(optimizer, "_optimizer", optimizer).optimizer
        return adam


def _gathered(parameter: Parameter, moment: str | None = None) -> torch.Tensor:
    """The complete parameter, or one of its moments, float32 on the CPU. All ranks call this together."""
    import deepspeed

    if not parameter.requires_grad:
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            return parameter.detach().float().cpu().clone()
    copied: torch.Tensor = _full(parameter, moment).detach().float().cpu().clone()
    return copied


def _full(parameter: Parameter, moment: str | None) -> torch.Tensor:
    """The optimizer's copy of a trained parameter, or one of its moments, complete. All ranks call this together."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    full: torch.Tensor | None
    full = safe_get_full_optimizer_state(parameter, moment) if moment else safe_get_full_fp32_param(parameter)
    assert full is not None, "a moment exists only after the first step"
    return full
