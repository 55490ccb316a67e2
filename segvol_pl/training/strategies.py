"""Devices, precision, and how the work is spread over processes: parallelism is applied here and in `deepspeed`.

1. `trainer_placement` gives Lightning its accelerator, devices and strategy, by `run.strategy`.
2. DDP keeps the complete model on each rank. `FullyShard` (FSDP2) splits it block by block, `deepspeed.ZeRO` by stages.
3. Each also runs on CPU ranks, so that a run can be rehearsed without GPUs.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies import Strategy as LightningStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    OffloadPolicy,
    OptimStateKeyType,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from segvol_pl.config import CheckpointFormat, RunConfig, Strategy
from segvol_pl.config.loader import custom_function
from segvol_pl.device import resolve_device, uses_bf16
from segvol_pl.errors import CheckpointError, ConfigError
from segvol_pl.model.image_encoder import Block
from segvol_pl.model.mask_decoder import MaskDecoder, TwoWayAttentionBlock
from segvol_pl.model.prompt_encoder import PromptEncoder
from segvol_pl.model.sharded import WEIGHTS, Sharded, open_sharded
from segvol_pl.planning import memory
from segvol_pl.training.averages import exchange, held
from segvol_pl.training.checkpoints import save_together
from segvol_pl.training.graph import StepGraph
from segvol_pl.training.module import Sharding, Task

STAGES = {Strategy.zero1: 1, Strategy.zero2: 2, Strategy.zero3: 3}
ACCELERATORS = ("auto", "cpu", "cuda")
"""Values of `run.accelerator`."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""
LEAST_TIMEOUT = 120.0
"""Smallest timeout of communication, in seconds: ranks do not start at the same moment."""


def trainer_precision(run: RunConfig) -> Any:
    """Lightning's name of the precision. Under DeepSpeed Lightning would cast weights and inputs, see `ZeRO`."""
    mixed = uses_bf16(run_device(run), run.precision) and run.strategy not in STAGES
    return "bf16-mixed" if mixed else "32-true"


def _accelerator(run: RunConfig) -> str:
    if run.accelerator not in ACCELERATORS:
        raise ConfigError(f"run.accelerator: {run.accelerator!r} is not one of {', '.join(ACCELERATORS)}")
    return resolve_device(run.accelerator).type


def run_device(run: RunConfig) -> torch.device:
    """The kind of device that the run computes on. Raises ConfigError."""
    return resolve_device(_accelerator(run))


def keep_freed_memory() -> None:
    """Let glibc keep the memory that this process frees, for reuse.

    The tensors of a step on a CPU are so large that glibc otherwise returns them to the kernel after each use.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            libc.mallopt(parameter, 2**31 - 1)


def environments() -> list[SLURMEnvironment]:
    """Lightning's SLURM plugin, without its saving and requeueing in the signal handler."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def trainer_placement(run: RunConfig) -> dict[str, Any]:
    """Lightning's accelerator, devices, num_nodes and strategy. Raises ConfigError if devices are missing."""
    accelerator = _accelerator(run)
    alone = accelerator == "cuda" and sees_its_own_alone(run.devices, torch.cuda.device_count())
    strategy = _strategy(run, accelerator)
    if alone:
        # Indexed by local rank. Lightning would use a device with that number, which this process cannot see.
        strategy.parallel_devices = [torch.device("cuda", 0)] * run.devices
    return {
        "accelerator": accelerator,
        "devices": 1 if alone else run.devices,
        "num_nodes": run.nodes,
        "strategy": strategy,
    }


def sees_its_own_alone(devices: int, seen: int) -> bool:
    """Whether each rank sees only its own device, as under `srun --gpus-per-task=1`.

    devices: ranks of this node; seen: devices that this process sees. Raises ConfigError if there are too few.
    """
    if devices <= seen:
        return False
    if seen == 1 and (environments() or "LOCAL_RANK" in os.environ):
        return True
    raise ConfigError(
        f"run.devices: {devices} requested, but this process sees {seen} GPU{'s' * (seen != 1)}: set it to {seen}, "
        "or give the job more (each task must see all GPUs of its node, or one of its own)"
    )


def waiting_time(run: RunConfig) -> timedelta:
    """How long ranks wait for each other: longer than the watchdog, which names the rank that hangs."""
    return timedelta(seconds=max(2 * run.hang_timeout, LEAST_TIMEOUT))


def _strategy(run: RunConfig, accelerator: str) -> Any:
    if run.custom_strategy:
        return custom_function(run.custom_strategy, "run.custom_strategy")(run)
    if run.strategy is Strategy.auto and run.devices * run.nodes == 1:
        return "auto"
    backend = "nccl" if accelerator == "cuda" else "gloo"
    timeout = waiting_time(run)
    if run.strategy is Strategy.fsdp:
        if run.offload and backend == "nccl":
            # Offloaded gradients are clipped in main memory, by their norm over all ranks.
            backend = "cuda:nccl,cpu:gloo"
        if torch.__version__ < "2.9":
            raise ConfigError(
                "run.strategy: fsdp needs torch 2.9 (before, CPU ranks summed gradients, not averaged them): use ddp"
            )
        return FullyShard(run, backend, timeout)
    if run.strategy in STAGES:
        if importlib.util.find_spec("deepspeed") is None:
            name = run.strategy.value
            raise ConfigError(f"run.strategy: {name} needs DeepSpeed: pip install 'segvol_pl[deepspeed]', or use fsdp")
        from segvol_pl.training.deepspeed import ZeRO

        return ZeRO(run, STAGES[run.strategy], backend, timeout)
    return replicated(run, backend, timeout)


def replicated(run: RunConfig, backend: str, timeout: timedelta) -> Replicated:
    """Make the strategy of DDP.

    With a static graph, or if no weight can be unused, torch moves the gradients into another order after the first
    step. The order in which a norm is summed, and on several GPUs that in which ranks are, depends on where a gradient
    lies: a resumed run would differ from an uninterrupted one. Looking for unused weights keeps the order.
    """
    # torch fails if the first backward pass of a static graph does not synchronise, as under accumulation.
    static = run.accumulate == 1 and not run.deterministic
    return Replicated(
        process_group_backend=backend,
        gradient_as_bucket_view=True,
        static_graph=static,
        find_unused_parameters=run.deterministic,
        timeout=timeout,
    )


class Replicated(DDPStrategy):
    """DDP: a complete model on each rank."""

    def _setup_model(self, model: torch.nn.Module) -> DistributedDataParallel:
        # Lightning builds it on a stream of its own, to which every gradient would then be brought, one by one.
        return DistributedDataParallel(model, device_ids=self.determine_ddp_device_ids(), **self._ddp_kwargs)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Save on rank 0, or together if each rank writes its part."""
        save_together(self, checkpoint, filepath)


class FullyShard(ModelParallelStrategy):
    """FSDP2: the weights of a block are gathered while it computes. Rank 0 writes checkpoints, or each rank its part.

    With `run.shard_degree` below the number of ranks (HSDP), as many neighbouring ranks share one copy of the weights,
    and gradients are averaged over the copies.
    """

    def __init__(self, run: RunConfig, backend: str, timeout: timedelta) -> None:
        super().__init__(save_distributed_checkpoint=False, process_group_backend=backend, timeout=timeout)
        self.run = run
        self.decoding: list[FSDPModule] = []
        self.sharding = Sharding(False, self._shard, self._gather, self._exchange, self._exchange)

    @property
    def offloads(self) -> bool:
        """Whether the shards stay in main memory while this rank computes on a GPU."""
        return self.run.offload and self.root_device.type != "cpu"

    def setup_environment(self) -> None:
        """Start the process group, and make the mesh that the weights are sharded over."""
        self._setup_distributed()
        degree = self.run.shard_degree or self.world_size
        # Launchers number ranks node by node, so that neighbours in the last axis are on one node. With one axis, torch
        # uses the group of all ranks with all its backends.
        if degree == self.world_size:
            self._device_mesh = init_device_mesh(self.root_device.type, (degree,), mesh_dim_names=("shard",))
            return
        axes = ("replicate", "shard")
        # Offloaded gradients are clipped over gloo, which the groups of an axis otherwise may lack.
        backends: dict[Any, Any] = dict.fromkeys(axes, self.process_group_backend)
        self._device_mesh = init_device_mesh(
            self.root_device.type,
            (self.world_size // degree, degree),
            mesh_dim_names=axes,
            backend_override=backends,
        )

    def model_to_device(self) -> None:
        """Move the module to the device. With offloading only its buffers: FSDP2 moves the weights block by block."""
        if not self.offloads:
            super().model_to_device()
            return
        assert self.lightning_module is not None
        self._reshard()
        _move_buffers(self.lightning_module, self.root_device)
        # The device that batches are moved to.
        _update_properties(self.lightning_module, device=self.root_device)

    @property
    def _saves_shards(self) -> bool:
        return self.run.checkpoint_format is CheckpointFormat.sharded

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights: each rank's shards, or gathered on rank 0."""
        if not self._saves_shards:
            return super().lightning_module_state_dict()
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The optimizer's state, in the same way. Numbered by the optimizer's groups, as torch's optimizers do."""
        if self._saves_shards:
            return LightningStrategy.optimizer_state(self, optimizer)
        # Importing torch's distributed checkpoint takes a while, and other runs do not need it.
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        assert self.model is not None
        inner = getattr(optimizer, "_optimizer", optimizer)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = get_optimizer_state_dict(self.model, inner, options=options)
        if self.is_global_zero:
            # Lightning would number by the order of the module's weights, frozen ones included.
            state = FullyShardedDataParallel.rekey_optim_state_dict(
                state, OptimStateKeyType.PARAM_ID, self.model, optim=inner
            )
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Save on rank 0, or together if each rank writes its part."""
        save_together(self, checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load each rank's shard of the complete or sharded checkpoint. Raises CheckpointError."""
        path = Path(checkpoint_path)
        return self._load_shards(open_sharded(path)) if path.is_dir() else self._load_whole(path)

    def _load_whole(self, path: Path) -> dict[str, Any]:
        """Fill this rank's shards in place. Ranks need not call this together. Returns the checkpoint.

        Unlike Lightning's method, it follows the order of the optimizer's groups.
        """
        assert self.lightning_module is not None
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        weights, saved = self.lightning_module.state_dict(), checkpoint["state_dict"]
        if different := sorted(weights.keys() ^ saved.keys()):
            raise CheckpointError(f"{path} is of another model: {different[0]}: check the model section")
        with torch.no_grad():
            for name, value in saved.items():
                held(weights[name]).copy_(held(_split_as(weights[name], value)))
        for optimizer, whole in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            numbers = (number for group in whole["param_groups"] for number in group["params"])
            own = dict(zip(numbers, parameters, strict=True))
            state = {
                number: {key: _split_as(own[number], value) for key, value in values.items()}
                for number, values in whole["state"].items()
            }
            optimizer.load_state_dict({**whole, "state": state})
        return checkpoint

    def _load_shards(self, saved: Sharded) -> dict[str, Any]:
        """Fill this rank's shards in place. Returns what the checkpoint holds besides."""
        assert self.lightning_module is not None
        weights, small = self.lightning_module.state_dict(), saved.header["state_dict"]
        targets = {WEIGHTS + name: value for name, value in weights.items() if small.get(name) is None}
        moments: list[dict[int, dict[str, torch.Tensor]]] = []
        for place, optimizer in enumerate(self.optimizers):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            states = saved.header["optimizer_states"][place]["state"]
            moments.append({i: _emptied(state, parameters[i]) for i, state in states.items()})
            for i, state in moments[-1].items():
                names = {key: f"optimizer_states.{place}.state.{i}.{key}" for key in state}
                targets |= {name: state[key] for key, name in names.items() if name in saved.tensors}
        saved.load_into(targets)
        with torch.no_grad():
            for name, value in small.items():
                if value is not None:
                    weights[name].copy_(value)
        for optimizer, loaded, whole in zip(self.optimizers, moments, saved.header["optimizer_states"], strict=True):
            optimizer.load_state_dict({**whole, "state": loaded})
        return saved.header

    def _shard(self, module: pl.LightningModule) -> None:
        # Lightning asks for this before validation and again before training.
        if isinstance(module, FSDPModule):
            return
        reduced = torch.bfloat16 if uses_bf16(self.root_device, self.run.precision) else None
        settings: dict[str, Any] = {
            "mesh": self.device_mesh,
            # Inputs are not cast: coordinates would lose digits. Autocast casts where it is safe.
            "mp_policy": MixedPrecisionPolicy(reduced, reduce_dtype=torch.float32, cast_forward_inputs=False),
            "offload_policy": CPUOffloadPolicy() if self.offloads else OffloadPolicy(),
        }
        blocks = sharded_blocks(module)
        for block in blocks:
            fully_shard(block, **settings)
        for block in (each for each in blocks if isinstance(each, TwoWayAttentionBlock)):
            for method in ("project_image", "add_dense"):
                register_fsdp_forward_method(block, method)
            assert isinstance(block, FSDPModule)
            self.decoding.append(block)
        fully_shard(module, **settings)
        # FSDP2 gathers before forward, but Lightning calls these.
        for step in ("training_step", "validation_step"):
            register_fsdp_forward_method(module, step)

    def _exchange(self, optimizer: Any) -> None:
        self._reshard()
        exchange(optimizer)

    def _reshard(self) -> None:
        # A validation leaves the outermost weights gathered: the optimizer has the shards.
        assert self.lightning_module is not None
        for part in self.lightning_module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def _gather(self) -> None:
        # Up to torch 2.10 a block that has had its backward pass is not gathered again for a group that is recomputed.
        for block in self.decoding:
            block.unshard()


def _emptied(state: dict[str, Any], parameter: torch.Tensor) -> dict[str, Any]:
    """A parameter's state in the optimizer, with room for what the ranks have sharded as they have the parameter."""
    return {key: torch.zeros_like(parameter) if value is None else value for key, value in state.items()}


def _split_as(like: torch.Tensor, value: Any) -> Any:
    """A complete tensor split as `like` is. Other values, such as a step count, as they are."""
    if not isinstance(like, DTensor) or not isinstance(value, torch.Tensor) or value.shape != like.shape:
        return value
    # Of an offloaded weight the shard is in main memory, though its mesh is of GPUs.
    own = torch.zeros_like(like)
    held(own).copy_(held(distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)))
    return own


def _move_buffers(module: torch.nn.Module, device: torch.device) -> None:
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))


def sharded_blocks(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The transformer blocks of encoder and decoder."""
    return [part for part in module.modules() if isinstance(part, Block | TwoWayAttentionBlock)]


def compile_parts(module: torch.nn.Module, run: RunConfig) -> None:
    """Compile the encoder's blocks (equal ones once), the prompt encoder and the mask decoder, with static shapes.

    A single process on a GPU also records its step as one CUDA graph. Ranks do not: their gradients would all be there
    at the end only, so that no exchange could overlap with the backward pass.

    Under fsdp only the blocks: its hooks stay outside of them, and groups of prompts are recomputed, for which a
    compiled part does not save the same tensors twice.
    """
    kinds: tuple[type[torch.nn.Module], ...] = (Block,)
    if run.strategy is not Strategy.fsdp:
        kinds += (PromptEncoder, MaskDecoder)
    # There are few shapes: only the last group of prompts differs, in training and in validation.
    for part in module.modules():
        if isinstance(part, kinds):
            part.forward = torch.compile(part.forward, dynamic=False)
    if isinstance(module, Task) and memory.replays(run) and run_device(run).type == "cuda":
        module.graph = StepGraph(module, module.losses)
