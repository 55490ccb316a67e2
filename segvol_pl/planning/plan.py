"""`segvol-pl plan`: estimates memory and time of a run before it is launched, without importing torch.

1. The run's configuration is loaded; `nodes`, `gpus` and `device` describe the hardware,
   `volumes` and `corpus_gb` the corpus.
2. Parameters and operations are counted (`flops`), and memory for every strategy (`memory`).
3. Rates are the device's peak times the shares of it that were measured on one GPU (`REACHED`).
4. With `volumes` and `corpus_gb`, what the nodes read from the store at these rates, and what their caches hold.

With `coordinates=true` the command prints a check of the run's parametrisation instead, see `training.coordinates`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from segvol_pl.config import PackConfig, Precision, PretrainConfig, Recompute, RunConfig, Strategy, TrainConfig, loader
from segvol_pl.errors import ConfigError
from segvol_pl.planning import flops, memory
from segvol_pl.planning.devices import ACCELERATORS, Accelerator, accelerator
from segvol_pl.planning.node_cache import NodeCache

GIB = 2**30
RESERVE = 2.0
"""GiB of a device that a run cannot use: context, libraries, fragmentation."""
REACHED = {"pretrain": (0.25, 0.35), "train": (0.11, 0.21)}
"""Shares of the peak measured on one H200 with the full model in bf16: by default, and with compiled parts. Its host
was slow at launching kernels; see benchmarks/results."""
RECORDED = {"pretrain": 0.45, "train": 0.28}
"""The same for a single process with run.compile, which records its step as one CUDA graph."""
DEVICE = "h100"
PLACE = {"nodes": "run.nodes", "gpus": "run.devices"}
OWN = ("device", "volumes", "corpus_gb", "coordinates")
"""Keys of the plan itself."""
KEPT_OPEN = 256
"""Shards that a loader process keeps open, as `data.store` does."""
UNUSED = ("data.shards=DIR", "run.out=DIR")
"""Placeholders for required keys that a plan does not depend on."""

Config = PretrainConfig | TrainConfig


@dataclass(frozen=True)
class Stored:
    """A corpus: its volumes, and their bytes in shards."""

    volumes: int
    bytes: float


@dataclass(frozen=True)
class Plan:
    """A run on devices of one kind, and its corpus if it is known."""

    config: Config
    device: Accelerator
    corpus: Stored | None = None
    coordinates: bool = False
    """Whether to make the coordinate check instead, `training.coordinates`."""

    @property
    def kind(self) -> str:
        """The command that runs it."""
        return "pretrain" if isinstance(self.config, PretrainConfig) else "train"

    @property
    def ranks(self) -> int:
        """Number of devices over all nodes."""
        return self.config.run.devices * self.config.run.nodes

    @property
    def micro_batch(self) -> int:
        """Volumes on one device at once."""
        return micro_batch(self.config)

    def under(self, strategy: Strategy) -> Config:
        """The configuration with another strategy."""
        degree = self.config.run.shard_degree if strategy is Strategy.fsdp else 0
        return replace(self.config, run=replace(self.config.run, strategy=strategy, shard_degree=degree))

    def peak(self, strategy: Strategy, volumes: int) -> memory.Memory:
        """Peak memory per device under `strategy` with `volumes` volumes at once."""
        return memory.peak(self.under(strategy), volumes, self.bf16, self.room)

    @property
    def room(self) -> float:
        """Bytes of a device that a run can use."""
        return (self.device.gib - RESERVE) * GIB

    def groups(self) -> list[int]:
        """Prompts of each volume that are decoded together, group by group; empty in pre-training."""
        if isinstance(self.config, PretrainConfig):
            return []
        count = self.config.prompts.per_volume
        return memory.prompt_groups(self.config, count, self.micro_batch, self.bf16, self.room)

    @property
    def bf16(self) -> bool:
        """Whether to compute in bf16, as `auto` does on all these devices."""
        return self.config.run.precision is not Precision.fp32

    def largest(self, strategy: Strategy) -> int:
        """The largest number of volumes that fit on a device at once; 0 if not even one does."""

        def needed(volumes: int) -> float:
            return self.peak(strategy, volumes).total

        if needed(1) > self.room:
            return 0
        # The memory of the optimizer's step is constant; the others grow linearly once only one prompt at a time fits.
        slope = needed(1025) - needed(1024)
        guess = int(self.room / slope) if slope else 1
        return max(count for count in range(1, guess + 2) if needed(count) <= self.room)

    @property
    def operations(self) -> float:
        """Operations per volume including recomputation, which MFU does not count."""
        parts = flops.volume_work(self.config)
        again = parts["encoder"].forward if self.config.run.recompute is Recompute.blocks else 0
        return flops.total(parts).total + again

    @property
    def reached(self) -> tuple[float, float]:
        """Shares of the devices' peak, from and to."""
        low, high = REACHED[self.kind]
        return low, RECORDED[self.kind] if memory.recordable(self.config.run) else high

    def rates(self) -> tuple[float, float]:
        """Lower and upper estimate of volumes/s of all devices together."""
        peak = self.ranks * self.device.peak(self.bf16) * 1e12
        low, high = (share * peak / self.operations for share in self.reached)
        return low, high


def plan(arguments: list[str]) -> Plan:
    """Make the plan of `FILE.yaml ... [nodes=N] [gpus=N] [device=NAME] [volumes=N corpus_gb=GB] [coordinates=true]
    [KEY=VALUE ...]`.

    Raises ConfigError.
    """
    own, keys = {"device": DEVICE, "coordinates": "false"}, []
    for argument in arguments:
        key, between, value = argument.partition("=")
        if key in OWN and between:
            own[key] = value
        else:
            keys.append(f"{PLACE[key]}={value}" if key in PLACE and between else argument)
    known = accelerator(own["device"])
    if known is None:
        names = ", ".join(one.name for one in ACCELERATORS)
        raise ConfigError(f"device: {own['device']!r} is none of {names}", "device")
    if own["coordinates"] not in ("true", "false"):
        raise ConfigError(f"coordinates: {own['coordinates']!r} is neither true nor false", "coordinates")
    coordinates = own["coordinates"] == "true"
    unused = [*UNUSED, *([f"optim.max_steps={10**9}"] if coordinates else [])]
    made = Plan(loader.load_run([*unused, *keys]), known, _stored(own), coordinates)
    _check(made)
    return made


def _stored(own: dict[str, str]) -> Stored | None:
    """The corpus that `volumes` and `corpus_gb` describe; None without them."""
    given = [key for key in ("volumes", "corpus_gb") if key in own]
    if not given:
        return None
    if len(given) == 1:
        raise ConfigError(f"{given[0]}: give volumes=N and corpus_gb=GB together", given[0])
    for key in given:
        if not re.fullmatch(r"\d+(\.\d+)?", own[key]) or float(own[key]) < 1:
            raise ConfigError(f"{key}: {own[key]!r} is not a number of at least 1", key)
    return Stored(int(float(own["volumes"])), float(own["corpus_gb"]) * 1e9)


def _check(made: Plan) -> None:
    shares = made.ranks * made.config.run.accumulate
    if made.micro_batch * shares != made.config.data.global_batch:
        raise ConfigError(
            f"data.global_batch: {made.config.data.global_batch} cannot be shared by {made.ranks} devices x "
            f"run.accumulate={made.config.run.accumulate}"
        )


def strategies(run: RunConfig) -> list[Strategy]:
    """The strategies that fit the number of devices and `run.offload`."""
    several = [one for one in Strategy if one is not Strategy.auto]
    alone = run.devices * run.nodes == 1
    return [Strategy.auto] if alone else [one for one in several if not run.offload or one is not Strategy.ddp]


def lines(made: Plan) -> Iterator[str]:
    """The plan as text."""
    config, run = made.config, made.config.run
    place = f"{run.nodes} x {run.devices} {made.device.name}"
    chosen = " (auto takes it on this device)" if run.precision is Precision.auto else ""
    yield f"{made.kind} on {place}, {_precision(made)}{chosen}, global batch {config.data.global_batch}"
    yield from _parts("parameters", "M", 1e6, {name: float(n) for name, n in flops.run_parameters(config).items()})
    trained = sum(flops.trained_parameters(config).values())
    if trained < sum(flops.run_parameters(config).values()):
        yield f"  of these train {trained / 1e6:.3f} M (optim.lora_rank={config.optim.lora_rank})"
    work = {name: float(part.total) for name, part in flops.volume_work(config).items()}
    yield from _parts("operations of a volume, forward and backward", "TFLOP", 1e12, work)
    yield from _memory(made)
    yield from _time(made)
    if made.corpus:
        yield from _reading(made, made.corpus)


def _precision(made: Plan) -> str:
    return "bf16" if made.bf16 else "fp32"


def _parts(title: str, unit: str, scale: float, parts: dict[str, float]) -> Iterator[str]:
    yield f"\n{title}: {sum(parts.values()) / scale:.3f} {unit}"
    yield from (f"  {name:<16}{value / scale:>10.3f}" for name, value in parts.items())


def _memory(made: Plan) -> Iterator[str]:
    run = made.config.run
    at_once = f"{made.micro_batch} volume{'s' * (made.micro_batch != 1)} at once"
    yield f"\nmemory of a device, GiB, at {at_once} (of {made.device.gib:.0f}, {RESERVE:.0f} of them not to be had)"
    heads = ("weights", "gradients", "optimizer", "activations", "together", "most volumes at once")
    yield f"  {'strategy':<10}" + "".join(f"{head:>13}" for head in heads[:-1]) + f"  {heads[-1]}"
    for strategy in strategies(run):
        peak = made.peak(strategy, made.micro_batch)
        cells = (peak.weights, peak.gradients, peak.optimizer, peak.activations, peak.total)
        fits = "" if peak.total / GIB + RESERVE <= made.device.gib else "  does not fit"
        figures = "".join(f"{cell / GIB:>13.2f}" for cell in cells)
        yield f"  {strategy.value:<10}{figures}  {made.largest(strategy)}{fits}"
    if run.shard_degree:
        copies = made.ranks // run.shard_degree
        yield f"  fsdp shards over {run.shard_degree} ranks, {copies} copies (run.shard_degree={run.shard_degree})"
    if groups := made.groups():
        stated = f"run.prompts_at_once={run.prompts_at_once}"
        yield f"  prompts of a volume at once: {max(groups)} of {sum(groups)} ({stated})"
    yield "  (auto's model is checked against measured peaks; what the others add is by arithmetic alone)"


def _time(made: Plan) -> Iterator[str]:
    config, (low, high) = made.config, made.rates()
    volumes = config.optim.max_steps * config.data.global_batch
    percent = " to ".join(f"{100 * share:.0f}" for share in made.reached)
    against = f"{made.device.peak(made.bf16):.0f} TFLOP/s in {_precision(made)}"
    yield f"\nat {percent} % of the peak, {against} (measured on one H200; a run logs its own as rate/mfu)"
    yield f"  volumes/s, together   {low:.1f} to {high:.1f}"
    yield f"  {config.optim.max_steps} steps        {volumes / high / 3600:.1f} to {volumes / low / 3600:.1f} hours"
    workers = max(config.data.workers, 1)
    each = high / config.run.nodes
    yield f"\nthe loader must deliver, at {high:.1f} volumes/s"
    yield f"  a node                {each:.1f} volumes/s, {each * sample_bytes(config) / 1e9:.2f} GB/s"
    yield f"  a loader process      a sample in {1000 * made.ranks * workers / high:.0f} ms ({workers} a device)"


def _reading(made: Plan, corpus: Stored) -> Iterator[str]:
    config, nodes = made.config, made.config.run.nodes
    data, rate = config.data, made.rates()[1]
    size = corpus.bytes / corpus.volumes
    epochs = math.ceil(config.optim.max_steps * data.global_batch / (corpus.volumes * data.samples_per_volume))
    hits = cache_hits(made, corpus, epochs)
    together = rate * size / 1e9
    missed = together * (1 - sum(hits) / len(hits))
    shards = math.ceil(corpus.volumes / PackConfig.samples_per_shard)
    opens = rate * max(0.0, 1 - KEPT_OPEN / shards)
    yield f"\nreading complete volumes of {size / 1e6:.1f} MB, at {rate:.1f} volumes/s (crops read a part of them)"
    yield f"  a node                {together / nodes:.2f} GB/s"
    yield f"  from its cache        {_hits(config, hits)}"
    yield f"  from the store        {missed / nodes:.2f} GB/s a node, {missed:.2f} GB/s together"
    yield f"  opens of shards       {opens:.0f} /s together, in a mounted folder of {shards} shards"


def _hits(config: Config, hits: list[float]) -> str:
    if not config.data.cache:
        return "nothing (data.cache is not set)"
    last = min(config.data.locality_epochs, len(hits))
    period = hits[1:last]
    within = f"{100 * sum(period) / len(period):.0f} % in epochs 2 to {last}, " if period else ""
    mean = f"{100 * sum(hits) / len(hits):.0f} % in epochs 1 to {len(hits)}"
    return f"{within}{mean} (data.locality={config.data.locality}, {config.data.cache_gb:.0f} GB)"


def cache_hits(made: Plan, corpus: Stored, epochs: int) -> list[float]:
    """Share of what a node reads that is in its cache, for each of the first epochs; zeros without a cache."""
    data = made.config.data
    cached = 1e9 * data.cache_gb / corpus.bytes if data.cache else 0
    keys = (data.locality, data.locality_epochs, data.samples_per_volume)
    return NodeCache(made.config.run.nodes, cached, *keys).hits(epochs)


def micro_batch(config: Config) -> int:
    """Volumes on one device at once, if the global batch is divisible."""
    run = config.run
    return config.data.global_batch // (run.devices * run.nodes * run.accumulate)


def sample_bytes(config: Config) -> int:
    """Bytes of a sample as sent to the device: int16 HU, and one bit per voxel of each mask, in full bytes per kind."""
    masks = 0
    if isinstance(config, TrainConfig):
        counts = config.prompts.categories_per_volume, config.prompts.pseudo_per_volume
        masks = sum(-(-count // 8) for count in counts)
    return math.prod(config.model.input_shape) * (2 + masks)
