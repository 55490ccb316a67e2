"""Names of our libraries that we rely on though their documentation does not promise them.

One table, `INTERNALS`: a name, the module of ours that uses it, and a check of what we expect of it. A test that fails
after an upgrade says that the library has changed, and where to look.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin, _update_properties
from lightning.fabric.wrappers import _FabricOptimizer
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.strategies import Strategy as LightningStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.utils.data import DataLoader, Dataset

import segvol_pl
from segvol_pl.__main__ import CARRIED
from segvol_pl.errors import ShardError

PACKAGE = Path(segvol_pl.__file__).parent


@dataclass(frozen=True)
class Internal:
    """A name of a library that may change without notice."""

    name: str
    used_in: str
    """Module of ours."""
    holds: Callable[[], bool]
    """Whether it still is what that module expects."""


def says(thing: Callable[..., object] | type, *texts: str) -> bool:
    """Whether the source of a function or class has all the texts."""
    source = inspect.getsource(thing)
    return all(text in source for text in texts)


def found_inf_skips_a_step() -> bool:
    weight = torch.nn.Parameter(torch.ones(2))
    adamw = torch.optim.AdamW([weight], lr=0.1, fused=True)
    weight.grad = torch.ones(2)
    adamw.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    adamw.step()
    return bool((weight == 1).all()) and float(adamw.state[weight]["step"]) == 0


def averages_move_by_a_share() -> bool:
    average = torch.zeros(2)
    torch._foreach_lerp_([average], [torch.ones(2)], 0.25)
    return bool((average == 0.25).all())


def parameters_may_be_replaced() -> bool:
    """As the graph does while a step is recorded: by any tensor, which the forward pass then uses."""
    layer = torch.nn.Linear(2, 1, bias=False)
    layer._parameters["weight"] = torch.full((1, 2), 3.0)  # type: ignore[assignment]
    return bool(layer(torch.ones(1, 2)).item() == 6)


def backends_are_listed_by_device() -> bool:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        return "cpu:gloo" in torch.distributed.get_backend_config(torch.distributed.group.WORLD)
    finally:
        torch.distributed.destroy_process_group()


def fake_ranks_take_part() -> bool:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=3, world_size=7)
    try:
        torch.distributed.all_reduce(torch.ones(1))  # returns, though there is nobody else
        return torch.distributed.get_rank() == 3 and torch.distributed.get_world_size() == 7
    finally:
        torch.distributed.destroy_process_group()


def shards_are_made_of_a_spec() -> bool:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        shard = DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (1,)), [Shard(0)])
        again = DTensor(torch.zeros(2), shard._spec, requires_grad=False)  # type: ignore[call-arg]
        return again.placements == shard.placements and bool((again.to_local() == 0).all())
    finally:
        torch.distributed.destroy_process_group()


def snapshots_are_taken() -> bool:
    taking = inspect.signature(torch.cuda.memory._dump_snapshot).parameters
    return "filename" in taking and says(torch.cuda.memory._record_memory_history, "max_entries")


def properties_are_set_without_moving_weights() -> bool:
    module = LightningModule()
    module.layer = torch.nn.Linear(1, 1)
    _update_properties(module, device=torch.device("meta"))
    return module.device.type == "meta" and module.layer.weight.device.type == "cpu"


def progress_counts_batches() -> bool:
    loop = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).fit_loop
    progress = loop.state_dict()["epoch_loop.batch_progress"]
    return {"total", "current"} <= progress.keys()


def wandb_settings_are_kept() -> bool:
    return says(WandbLogger, "self._wandb_init: dict", "wandb.init(**self._wandb_init)")


def trainer_states_its_logging_interval() -> bool:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, log_every_n_steps=7)
    return bool(trainer.log_every_n_steps == 7)  # type: ignore[attr-defined]


def _engine() -> type:
    from deepspeed.runtime.engine import DeepSpeedEngine

    return DeepSpeedEngine  # type: ignore[no-any-return]


def _stage_2() -> type:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    return DeepSpeedZeroOptimizer  # type: ignore[no-any-return]


def _stage_3() -> type:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    return DeepSpeedZeroOptimizer_Stage3  # type: ignore[no-any-return]


def _config() -> type:
    from deepspeed.runtime.config import DeepSpeedConfig

    return DeepSpeedConfig  # type: ignore[no-any-return]


def parameters_of_stage_3_are_marked() -> bool:
    from deepspeed.runtime.zero import partition_parameters

    return says(partition_parameters.Init, "param.ds_id = ")


def surfels_have_normals() -> bool:
    """256 codes, whose areas are those of MONAI's public function, which computes them in float32."""
    from monai.metrics.utils import get_code_to_measure_table

    from segvol_pl.evaluation.surfels import surfel_areas

    table_C, _ = get_code_to_measure_table((3.0, 0.8, 0.7))
    return torch.allclose(table_C.double(), torch.from_numpy(surfel_areas((3.0, 0.8, 0.7))), rtol=1e-6)


def server_keeps_its_http_server() -> bool:
    from bokeh.server.server import BaseServer, Server

    return says(BaseServer, "self._tornado") or says(Server, "self._tornado")


ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
TORCH = [
    Internal("Module._parameters", "training.graph", parameters_may_be_replaced),
    Internal("_is_amx_tile_supported", "device", lambda: isinstance(torch.cpu._is_amx_tile_supported(), bool)),
    Internal(
        "_foreach_mul",
        "training.grouped_loss",
        lambda: torch._foreach_mul([torch.ones(1)], torch.tensor(3.0))[0].item() == 3,
    ),
    Internal("_foreach_copy_", "model.narrow", lambda: callable(torch._foreach_copy_)),
    Internal("_foreach_lerp_", "training.averages", averages_move_by_a_share),
    Internal("_new_shared", "data.collate", lambda: torch.UntypedStorage._new_shared(8).is_shared()),
    *(Internal(name, "model.image_encoder", lambda name=name: hasattr(torch.ops.aten, name)) for name in ATTENTION),
    Internal("AdamW.found_inf", "training.module", found_inf_skips_a_step),
    Internal("get_backend_config", "training.ranks", backends_are_listed_by_device),
    Internal("fake_pg.FakeStore", "training.rehearsal", fake_ranks_take_part),
    Internal("_internal", "training.rehearsal", fake_ranks_take_part),
    Internal("_C", "training.postmortem", lambda: hasattr(torch._C._distributed_c10d, "_dump_fr_trace")),
    Internal("_record_memory_history", "training.out_of_memory", snapshots_are_taken),
    Internal("_dump_snapshot", "training.out_of_memory", snapshots_are_taken),
    Internal("DTensor._spec", "training.sharded", shards_are_made_of_a_spec),
    Internal(
        "FileSystemReader.read_data",
        "model.sharded",
        lambda: says(
            FileSystemReader.read_data,
            "self.storage_data[",
            ".relative_path",
            ".transform_descriptors",
            "weights_only=True",
        ),
    ),
    Internal(
        "FileSystemWriter.write_data",
        "training.sharded",
        lambda: says(inspect.getmodule(FileSystemWriter), "inflight_threshhold > 0", "_SerialCpuLoader("),  # type: ignore[arg-type]
    ),
]
LIGHTNING = [
    Internal(
        "DDPStrategy._ddp_kwargs", "training.strategies", lambda: says(DDPStrategy._setup_model, "self._ddp_kwargs")
    ),
    Internal("_update_properties", "training.strategies", properties_are_set_without_moving_weights),
    Internal("_device", "training.strategies", lambda: says(_DeviceDtypeModuleMixin, "self._device")),
    Internal(
        "ModelParallelStrategy._setup_distributed",
        "training.strategies",
        lambda: says(ModelParallelStrategy.setup_environment, "self._setup_distributed()", "self._device_mesh = "),
    ),
    Internal(
        "DDPStrategy.setup_environment",
        "training.deepspeed",
        lambda: says(DDPStrategy.setup_environment, "self.setup_distributed()"),
    ),
    Internal(
        "DeepSpeedStrategy._init_deepspeed_distributed",
        "training.deepspeed",
        lambda: says(DeepSpeedStrategy.setup_distributed, "self._init_deepspeed_distributed()"),
    ),
    Internal(
        "DeepSpeedStrategy._set_node_environment_variables",
        "training.deepspeed",
        lambda: says(DeepSpeedStrategy._init_deepspeed_distributed, "self._set_node_environment_variables()"),
    ),
    Internal(
        "Strategy.lightning_restore_optimizer",
        "training.deepspeed",
        lambda: isinstance(inspect.getattr_static(LightningStrategy, "lightning_restore_optimizer"), property),
    ),
    Internal("LightningOptimizer._optimizer", "training.deepspeed", lambda: says(_FabricOptimizer, "self._optimizer")),
    Internal("WandbLogger._wandb_init", "training.loggers", wandb_settings_are_kept),
    Internal("rank_zero_only.rank", "training.run", lambda: isinstance(rank_zero_only.rank, int)),  # type: ignore[attr-defined]
    Internal("fit_loop.epoch_loop.batch_progress", "training.callbacks", progress_counts_batches),
    Internal("Trainer.log_every_n_steps", "training.module", trainer_states_its_logging_interval),
]
DEEPSPEED = [
    Internal(
        "single_partition_of_fp32_groups",
        "training.deepspeed",
        lambda: says(_stage_2(), "self.single_partition_of_fp32_groups = []", "self.optimizer = init_optimizer"),
    ),
    Internal(
        "_lazy_init_hp_params_optimizer_state",
        "training.deepspeed",
        lambda: says(_stage_2(), "def _lazy_init_hp_params_optimizer_state(self):"),
    ),
    Internal(
        "_hp_optimizer_states_linked",
        "training.deepspeed",
        lambda: says(_stage_2()._lazy_init_hp_params_optimizer_state, "if not self._hp_optimizer_states_linked:"),  # type: ignore[attr-defined]
    ),
    Internal(
        "fp32_partitioned_groups_flat",
        "training.deepspeed",
        lambda: says(_stage_3(), "self.fp32_partitioned_groups_flat = []", "self.optimizer = init_optimizer"),
    ),
    Internal("Parameter.ds_id", "training.deepspeed", parameters_of_stage_3_are_marked),
    Internal("get_global_grad_norm", "training.gradients", lambda: hasattr(_engine(), "get_global_grad_norm")),
    Internal("backward(scale_wrt_gas)", "training.deepspeed", lambda: says(_engine(), "scale_wrt_gas=True")),
    Internal(
        "zero_force_ds_cpu_optimizer",
        "training.deepspeed",
        lambda: says(_config(), "self.zero_force_ds_cpu_optimizer", "self.torch_autocast_enabled"),
    ),
]
MONAI = [Internal("_get_neighbour_code_to_normals_table", "evaluation.surfels", surfels_have_normals)]
BOKEH = [Internal("_tornado", "inference.viewer", server_keeps_its_http_server)]
INTERNALS = [
    *((internal, "torch") for internal in TORCH),
    *((internal, "lightning") for internal in LIGHTNING),
    *((internal, "deepspeed") for internal in DEEPSPEED),
    *((internal, "monai") for internal in MONAI),
    *((internal, "bokeh") for internal in BOKEH),
]


@pytest.mark.parametrize(("internal", "library"), [pytest.param(*each, id=each[0].name) for each in INTERNALS])
def test_what_we_rely_on_is_there(internal: Internal, library: str) -> None:
    module = pytest.importorskip(library)
    assert internal.holds(), f"{library} {module.__version__} has changed {internal.name}: see {internal.used_in}"


def _sources() -> dict[str, ast.Module]:
    return {
        str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")
    }


def private_names(trees: dict[str, ast.Module]) -> Iterator[str]:
    """Names with a leading underscore that the sources use and do not define."""
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    ours = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    ours |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    ours |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    return (name for name in used - ours if name.startswith("_") and not name.startswith("__"))


def test_the_table_lists_every_private_name() -> None:
    listed = {internal.name.split(".")[-1] for internal, _ in INTERNALS} | {
        "_exit",
        "_current_frames",
    }  # documented, of os and sys
    assert set(private_names(_sources())) - listed == set()
    assert list(private_names({"a": ast.parse("import a\na._b()\nself._c = a.__d__\nself._c")})) == ["_b"]


def test_the_table_names_modules_that_exist() -> None:
    for internal, _ in INTERNALS:
        assert PACKAGE.joinpath(*internal.used_in.split(".")).with_suffix(".py").exists(), internal


class Failing(Dataset[int]):
    """Its samples cannot be read."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise ShardError("train-0.tar: cut short: copy it again")


def test_an_error_of_a_loader_process_has_the_form_that_the_command_line_reads() -> None:
    """torch raises it again in the training process, with the traceback as its text."""
    with pytest.raises(ShardError) as caught:
        list(DataLoader(Failing(), num_workers=1))
    found = CARRIED.fullmatch(str(caught.value))
    assert found is not None, f"torch {torch.__version__} words it differently: see CARRIED in segvol_pl/__main__.py"
    assert found[1].strip() == "train-0.tar: cut short: copy it again"
