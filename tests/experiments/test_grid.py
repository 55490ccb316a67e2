"""Grids: what a file expands to, how far its runs are, one of them and all of them; faults before anything runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from factories import TINY_KEYS
from holders import holding
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from segvol_pl.config import PointsConfig
from segvol_pl.config.loader import changes, plain
from segvol_pl.errors import ConfigError, RunError
from segvol_pl.experiments import launch
from segvol_pl.experiments.grid import Run, expand, read, volume_flops
from segvol_pl.experiments.points import gather
from segvol_pl.run_folder import read_metrics

ROOT = Path(__file__).parents[2]
ABLATIONS = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))
GIVEN = ["data.shards=shards", "optim.max_steps=10"]
SMALL = (
    "".join(f"  - {each}\n" for each in TINY_KEYS)
    + """\
  - text.source=seeded
  - data.global_batch=2
  - data.workers=0
  - data.samples_per_volume=4
  - prompts.categories_per_volume=1
  - optim.max_steps=3
  - run.accelerator=cpu
  - run.log_every=1
  - run.cpu_threads=1
  - run.val_batches=1
  - track.wandb=disabled
"""
)


def grid_of(folder: Path, text: str, *given: str) -> list[Run]:
    path = folder / "grid.yaml"
    path.write_text(text)
    return expand(read(path), [*GIVEN, *given])


def fault(folder: Path, text: str, *given: str) -> str:
    with pytest.raises(ConfigError) as caught:
        grid_of(folder, text, *given)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{folder}/", "")


# ---- what a file expands to ----


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_every_grid_expands_to_checked_runs(path: Path) -> None:
    runs = expand(read(path), ["data.shards=shards"])
    assert len(runs) > 1
    assert len({run.name for run in runs}) == len({run.out for run in runs}) == len(runs)
    assert [run.number for run in runs] == list(range(len(runs)))


def test_axes_are_crossed_and_seeds_are_fastest(tmp_path: Path) -> None:
    text = """
seeds: [3, 4]
axes:
  data.fraction: [0.5, 1.0]
  size:
    s: [model.hidden_size=32, model.num_heads=2]
    m: [model.hidden_size=64, model.num_heads=4]
"""
    runs = grid_of(tmp_path, text)
    names = [f"fraction-{f}_size-{s}_seed-{k}" for f in ("0.5", "1.0") for s in "sm" for k in (3, 4)]
    assert [run.name for run in runs] == names
    first, last = runs[0].config, runs[-1].config
    assert (first.data.fraction, first.model.hidden_size, first.data.seed) == (0.5, 32, 3)
    assert (last.data.fraction, last.model.hidden_size, last.data.seed, last.model.num_heads) == (1.0, 64, 4, 4)
    assert first.run.out == str(Path("runs/grid") / names[0]) and first.track.group == "grid"
    assert first.track.name == names[0] and runs[0].places == {"data.fraction": "0.5", "size": "s", "seed": "3"}


def test_zipped_axes_step_together(tmp_path: Path) -> None:
    text = """
axes:
  size: {s: model.hidden_size=32, m: model.hidden_size=64}
  pseudo_weight: [0, 0.1]
  optim.lr: [1e-3, 1e-4]
zip: [[size, optim.lr]]
"""
    runs = grid_of(tmp_path, text, "model.num_heads=2")
    assert [(r.config.model.hidden_size, r.config.optim.lr, r.config.pseudo_weight) for r in runs] == [
        (32, 1e-3, 0),
        (32, 1e-3, 0.1),
        (64, 1e-4, 0),
        (64, 1e-4, 0.1),
    ]


def test_names_outlive_what_is_added_to_an_axis(tmp_path: Path) -> None:
    before = grid_of(tmp_path, "axes: {pseudo_weight: [0, 0.1]}\nseeds: [0]\n")
    after = grid_of(tmp_path, "axes: {pseudo_weight: [0, 0.05, 0.1]}\nseeds: [0, 1]\n")
    assert {run.name for run in before} < {run.name for run in after}


LADDER = """
set: [optim.transfer={transfer}]
axes:
  size: {{s: [model.hidden_size=32, model.num_heads=2], m: [model.hidden_size=64, model.num_heads=4]}}
  {rates}
"""


def test_sizes_at_one_rate_are_warned_of_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for transfer, rates, warned in (
        ("none", "data.fraction: [0.5, 1.0]", 1),
        ("none", "optim.lr: [1e-3, 2e-3]", 0),
        ("mup", "data.fraction: [0.5, 1.0]", 0),
    ):
        caplog.clear()
        text = LADDER.format(transfer=transfer, rates=rates)
        launch.warn_of_one_rate(grid_of(tmp_path, text, "model.decoder_heads=2"))
        assert len(caplog.messages) == warned
        assert not warned or "2 widths (32 to 64) share optim.lr=0.0001" in caplog.messages[0]


@pytest.mark.parametrize("name", ["size", "flops"])
def test_the_grids_of_sizes_transfer_their_rate(name: str, caplog: pytest.LogCaptureFixture) -> None:
    runs = expand(read(ROOT / "configs" / "ablations" / f"{name}.yaml"), ["data.shards=shards"])
    launch.warn_of_one_rate(runs)
    assert not caplog.messages
    (base,) = {tuple(vars(run.config.optim.base_widths).items()) for run in runs}
    model = next(run.config.model for run in runs if run.places["size"] == "base")
    assert all(getattr(model, key) == value for key, value in base), "the rate is that of the published model"


def test_a_run_may_start_from_its_partner_in_another_grid(tmp_path: Path) -> None:
    text = """
seeds: [7]
set: ["text.template=A {} of {size}"]
axes:
  size: {s: [model.hidden_size=32, model.num_heads=2]}
  start:
    scratch: []
    simmim: ["pretrained=runs/pre/size-{size}_seed-{seed}/checkpoints/last.ckpt"]
"""
    scratch, simmim = grid_of(tmp_path, text)
    assert scratch.config.pretrained is None and scratch.config.text.template == "A {} of s"
    assert simmim.config.pretrained == "runs/pre/size-s_seed-7/checkpoints/last.ckpt"


def test_files_stand_beside_the_grid(tmp_path: Path) -> None:
    (tmp_path / "narrow.yaml").write_text("hidden_size: 32\nnum_heads: 2\n")
    (tmp_path / "start.yaml").write_text("pseudo_weight: 0.3\n")
    (run,) = grid_of(tmp_path, "files: [start.yaml]\naxes: {model: [narrow.yaml]}\n")
    assert (run.config.model.hidden_size, run.config.pseudo_weight) == (32, 0.3)


def test_lists_are_values_of_an_axis(tmp_path: Path) -> None:
    runs = grid_of(tmp_path, "axes: {prompts.combinations: [[text], [text, box+text]]}\n")
    assert [run.config.prompts.combinations for run in runs] == [["text"], ["text", "box+text"]]
    assert runs[1].name == "combinations-text-box+text_seed-0"


def test_the_command_line_wins_over_set(tmp_path: Path) -> None:
    (run,) = grid_of(tmp_path, "set: [pseudo_weight=0.3]\n", "pseudo_weight=0.4")
    assert run.config.pseudo_weight == 0.4


def test_budgets_buy_each_size_the_same_work(tmp_path: Path) -> None:
    text = """
files: [START]
axes:
  size: {s: [model.hidden_size=64, model.mlp_dim=128], m: [model.hidden_size=128, model.mlp_dim=512]}
flops: [1e14, 4e14]
""".replace("START", str(ROOT / "configs/tiny/train.yaml"))
    path = tmp_path / "iso.yaml"
    path.write_text(text)
    runs = expand(read(path), ["data.shards=shards"])
    steps = {run.name: run.config.optim.max_steps for run in runs}
    assert list(steps) == [f"size-{size}_flops-{budget}_seed-0" for size in "sm" for budget in ("1e+14", "4e+14")]
    for run in runs:
        spent = run.config.optim.max_steps * run.config.data.global_batch * volume_flops(run.config)
        assert spent == pytest.approx(float(run.places["flops"]), rel=0.01)
    assert steps["size-s_flops-1e+14_seed-0"] > steps["size-m_flops-1e+14_seed-0"] > 0
    path.write_text(text.replace("1e14", "1e10"))
    with pytest.raises(ConfigError, match=r"^flops .*1e\+10 .*optim\.warmup_steps"):
        expand(read(path), ["data.shards=shards"])


LENGTHS = """
set: [optim.schedule=wsd, optim.warmup_steps=10, run.val_every=0]
lengths: [100, 400, 200, 800]
axes: {pseudo_weight: [0, 0.1]}
"""


def lengths_of(folder: Path, text: str = LENGTHS, *given: str) -> list[Run]:
    path = folder / "lengths.yaml"
    path.write_text(text)
    return expand(read(path, str(folder / "runs")), ["data.shards=shards", *given])


def test_lengths_are_trunks_and_branches_numbered_after_them(tmp_path: Path) -> None:
    runs = lengths_of(tmp_path)
    assert [run.number for run in runs] == list(range(8))
    trunks, branches = runs[:2], runs[2:]
    assert [run.name for run in trunks] == [f"pseudo-weight-{w}_length-800_seed-0" for w in ("0", "0.1")]
    assert [run.places["length"] for run in branches] == ["100", "200", "400"] * 2
    for run in trunks:
        assert run.trunk is None and run.config.run.keep_steps == [80, 160, 320] and run.config.optim.max_steps == 800
    for run in branches:
        assert run.trunk in trunks and run.trunk.places["pseudo_weight"] == run.places["pseudo_weight"]
        start = run.trunk.out / f"checkpoints/step-{run.config.optim.decay_start}.ckpt"
        assert run.config.run.branch_from == str(start)
        changed = {key for key, (_, new) in changes(plain(run.trunk.config), plain(run.config)).items()}
        assert changed == {"optim.max_steps", "run.out", "run.keep_steps", "run.branch_from", "track.name"}


def test_four_lengths_cost_less_than_two_thirds(tmp_path: Path) -> None:
    runs = lengths_of(tmp_path)
    first, _, *commands = launch.branching(read(tmp_path / "lengths.yaml"), runs, ["data.shards=my shards"])
    assert first == "steps: 1,880 in place of 3,000, 37.3 % saved (trunks: 2, branches: 6)"
    call = f"slurm/grid.sbatch {tmp_path / 'lengths.yaml'} 'data.shards=my shards'"
    assert [line.strip() for line in commands] == [
        f"trunks=$(sbatch --parsable --array=0-1 {call})",
        f"sbatch --array=2-7 --dependency=afterok:$trunks {call}",
    ]
    assert launch.branching(read(tmp_path / "lengths.yaml"), runs[:2], []) == []


def test_a_longer_length_makes_the_old_trunk_a_branch_of_the_same_name(tmp_path: Path) -> None:
    before = {run.name for run in lengths_of(tmp_path)}
    after = lengths_of(tmp_path, LENGTHS.replace("800]", "800, 1600]"))
    assert before < {run.name for run in after}
    assert [run.places["length"] for run in after if run.trunk is None] == ["1600", "1600"]


def test_a_branch_waits_until_its_trunk_has_come_so_far(tmp_path: Path) -> None:
    run = lengths_of(tmp_path)[3]
    assert run.trunk is not None
    waits = launch.State("waits for trunk 0", 0, "for its step-160.ckpt; that run is missing, step 0")
    assert launch.state(run) == waits
    with pytest.raises(RunError, match=r"^run 3 .*length-200_seed-0: waits for trunk 0, for its step-160\.ckpt"):
        launch.start(run, lambda config: None, first=True)
    assert not run.out.exists()
    folder = run.trunk.out / "checkpoints"
    folder.mkdir(parents=True)
    launch._write(run.trunk, launch.FINISHED)
    assert re.match(r"which has finished without step-160\.ckpt: give another out=DIR", launch.state(run).detail)
    (folder / "step-160.ckpt").touch()
    assert launch.state(run) == launch.State(launch.MISSING)


def test_agents_of_wandb_get_no_branches(tmp_path: Path) -> None:
    runs = lengths_of(tmp_path)
    with pytest.raises(ConfigError, match=r"^sweep: agents do not wait for the trunks of `lengths`"):
        launch.sweep(read(tmp_path / "lengths.yaml"), runs, [])


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [
        ("lengths: [10, 20]\n", (), r"^lengths \(.*yaml\): need optim\.schedule=wsd, length-20_seed-0 has cosine: add"),
        ("lengths: [10, 10]\n", (), r"^lengths \(.*yaml:1\): List of different numbers of steps"),
        ("lengths: [0, 10]\n", (), r"^lengths \(.*yaml:1\): List of different numbers of steps"),
        ("lengths: [10]\nflops: [1e14]\n", (), r"^lengths \(.*yaml:1\): both lengths and flops set optim\.max_steps"),
        (
            "lengths: [10]\nset:\n  - optim.max_steps=3\n",
            (),
            r"^optim\.max_steps \(.*yaml:3\): the grid's key `lengths`",
        ),
        (
            LENGTHS.replace("=0]", "=200]"),
            (),
            r"^lengths \(.*yaml\): 100 is no multiple of run\.val_every=200",
        ),
        (LENGTHS, ("run.keep_steps=[1]",), r"^run\.keep_steps \(command line\): the grid's key `lengths` sets it"),
        ("lengths: [10]\naxes: {length: {a: []}}\n", (), r"^axes\.length \(.*yaml\): `lengths` is an axis"),
        (LENGTHS, ("optim.warmup_steps=90",), r"^optim\.warmup_steps: 90 .* begins at step 80 of optim\.max_steps=100"),
    ],
)
def test_wrong_lengths_are_refused(tmp_path: Path, text: str, given: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        lengths_of(tmp_path, text, *given)


# ---- faults ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("axis: {}\n", "unknown key axis (grid.yaml:1): did you mean axes?"),
        ("set:\n  - optim.lrr=1\n", "unknown key optim.lrr (grid.yaml:2): did you mean optim.lr?"),
        ("axes:\n  data.fractio: [1]\n", "unknown key data.fractio (grid.yaml:2): did you mean data.fraction?"),
        (
            "axes:\n  data.fraction:\n    - 0.5\n    - 2\n",
            "data.fraction (grid.yaml:4): ",
        ),
        ("axes:\n  a: {x: [pseudo_weight]}\n", "pseudo_weight (grid.yaml:2): "),
        ("axes:\n  a: {x: [run.out=b]}\n", "run.out (grid.yaml:2): "),
        ("seeds: [0, 0]\n", "seeds (grid.yaml:1): "),
        ("command: evaluate\n", "command (grid.yaml:1): "),
        ("axes: {a: {}}\n", "axes.a (grid.yaml:1): has no points"),
        ("axes:\n  optim.lr: [1e-3, 1e-3]\n", "axes.optim.lr (grid.yaml:2): two points are called 1e-3: name them"),
        ("zip: [[a, b]]\naxes: {a: {x: []}}\n", "zip (grid.yaml): b is not an axis"),
        ("zip: [[a, b]]\naxes: {a: {x: []}, b: {x: [], y: []}}\n", "zip (grid.yaml): axes that step together"),
        ("files: [nowhere.yaml]\n", "nowhere.yaml: no such file"),
    ],
)
def test_a_wrong_grid_names_file_line_and_remedy(tmp_path: Path, text: str, expected: str) -> None:
    assert fault(tmp_path, text).startswith(expected)


def test_what_the_grid_decides_is_not_given_beside_it(tmp_path: Path) -> None:
    assert "varies in the grid" in fault(tmp_path, "axes: {pseudo_weight: [0, 1]}\n", "pseudo_weight=2")
    assert "out=DIR" in fault(tmp_path, "seeds: [0]\n", "run.out=x")


def test_expanding_imports_nothing_heavy(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text("axes: {pseudo_weight: [0, 1]}\n")
    arguments = [str(path), *GIVEN, f"sweep={tmp_path / 'sweep.yaml'}"]
    command = [sys.executable, "-X", "importtime", "-m", "segvol_pl", "grid", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = set(re.findall(r"\|\s+([\w.]+)$", done.stderr, re.MULTILINE))
    assert "segvol_pl.atomic" in imported and not imported & {"torch", "lightning", "numpy", "wandb"}


# ---- running ----


def program(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "segvol_pl", "grid", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture
def two(tmp_path: Path, phantom_shards: Path) -> tuple[Path, list[str]]:
    """A grid of two runs, the second of which fails: there is no file to start from."""
    path = tmp_path / "two.yaml"
    points = f"{{whole: [], lost: [pretrained={tmp_path / 'lost.ckpt'}]}}"
    path.write_text(f"set:\n{SMALL}  - model.hidden_size=16\naxes:\n  start: {points}\n")
    return path, [f"data.shards={phantom_shards}", f"out={tmp_path / 'runs'}"]


def test_all_runs_are_tried_finished_ones_skipped_and_failed_ones_named(two: tuple[Path, list[str]]) -> None:
    path, given = two
    done = program(path, *given, "run=all")
    assert done.returncode == 1
    assert "1 of 2 runs did not finish: 1 start-lost_seed-0" in done.stderr.splitlines()[-1]
    listed = program(path, *given).stdout.splitlines()
    assert re.search(r"start-whole_seed-0 +finished +3/3", listed[1])
    assert re.search(r"start-lost_seed-0 +failed +0/3 .*lost\.ckpt", listed[2])
    assert re.fullmatch(r"held-out volumes: the same \d for all runs; none of them is trained on", listed[3])
    again = program(path, *given, "run=0")
    assert again.returncode == 0 and "already finished, skipped" in again.stderr
    tried = program(path, *given, "run=1")
    assert tried.returncode != 0 and "run 1 start-lost_seed-0: was failed" in tried.stderr
    assert "run=2: expected 0 to 1, or all" in program(path, *given, "run=2").stderr


def test_a_grid_that_was_changed_refuses_the_runs_of_before(two: tuple[Path, list[str]], tmp_path: Path) -> None:
    path, given = two
    assert program(path, *given, "run=0").returncode == 0
    record = (tmp_path / "runs/start-whole_seed-0/grid.json").read_text()
    path.write_text(path.read_text().replace("max_steps=3", "max_steps=4"))
    assert re.search(r"start-whole_seed-0 +changed +3/4 .*optim.max_steps 3 -> 4", program(path, *given).stdout)
    refused = program(path, *given, "run=0")
    assert refused.returncode == 1 and "optim.max_steps 3 -> 4: give another out=DIR" in refused.stderr
    assert (tmp_path / "runs/start-whole_seed-0/grid.json").read_text() == record


def test_a_run_that_was_stopped_goes_on(two: tuple[Path, list[str]], tmp_path: Path) -> None:
    path, given = two
    runs = expand(read(path, str(tmp_path / "runs")), given[:1])
    assert launch.state(runs[0]).name == launch.MISSING

    def stopped(config: object) -> None:
        (runs[0].out / "config.yaml").write_text("")
        assert launch.state(runs[0]).name == launch.RUNNING
        raise SystemExit(143)  # as at a signal

    with pytest.raises(SystemExit):
        launch.start(runs[0], stopped, first=True)
    path_of_record = runs[0].out / launch.GRID_ENTRY
    record = json.loads(path_of_record.read_text())
    path_of_record.write_text(json.dumps({**record, "started": record["started"] - 100}))
    assert launch.state(runs[0]).name == launch.PARTIAL
    assert program(path, *given, "run=0").returncode == 0
    assert launch.state(runs[0]) == launch.State(launch.FINISHED, 3)
    assert list(dict(read_metrics(runs[0].out / "metrics.csv", "train/loss"))) == [1, 2, 3]


def test_a_run_that_another_process_writes_is_refused_and_its_record_left(
    two: tuple[Path, list[str]], tmp_path: Path
) -> None:
    path, given = two
    record = tmp_path / "runs/start-whole_seed-0/grid.json"
    with holding(record.parent) as process:
        refused = program(path, *given, "run=0")
    assert refused.returncode == 1 and record.parent.name in refused.stderr and str(process.pid) in refused.stderr
    assert not record.exists()


def test_leaks_are_reported_in_the_listing(two: tuple[Path, list[str]], tmp_path: Path) -> None:
    path, given = two
    runs = expand(read(path), given[:1])
    assert launch.held_out(runs).endswith("none of them is trained on")
    leaking = [replace(run, config=replace(run.config, data=replace(run.config.data, split="all"))) for run in runs[1:]]
    assert launch.held_out([*runs[:1], *leaking]).endswith("ALSO TRAINED ON by 1 runs, first start-lost_seed-0")
    other = replace(runs[1].config, data=replace(runs[1].config.data, val_split="train", split="test"))
    assert "2 DIFFERENT SETS" in launch.held_out([runs[0], replace(runs[1], config=other)])


@pytest.mark.slow
def test_a_grid_of_lengths_runs_from_its_trunk_to_its_points(phantom_shards: Path, tmp_path: Path) -> None:
    """All runs, one after another; the points of a scaling law count the samples of each length."""
    path = tmp_path / "lengths.yaml"
    wsd = "  - model.hidden_size=16\n  - optim.schedule=wsd\n  - optim.warmup_steps=1\n  - run.val_every=0\n"
    small = SMALL.replace("  - optim.max_steps=3\n", "")
    path.write_text(f"set:\n{small}{wsd}lengths: [5, 10]\n")
    given = [f"data.shards={phantom_shards}", f"out={tmp_path / 'runs'}"]
    early = program(path, *given, "run=1")
    assert early.returncode == 1 and "run 1 length-5_seed-0: waits for trunk 0" in early.stderr.splitlines()[-1]
    assert program(path, *given, "run=all").returncode == 0
    listed = program(path, *given).stdout.splitlines()
    assert re.search(r"length-10_seed-0 +finished +10/10", listed[1])
    assert re.search(r"length-5_seed-0 +finished +5/5", listed[2])
    assert listed[4] == "steps: 11 in place of 15, 26.7 % saved (trunks: 1, branches: 1)"
    points = gather(PointsConfig(runs=[str(tmp_path / "runs")])).used
    assert {point.places["length"]: point.samples for point in points} == {"10": 20, "5": 10}


def test_a_sweep_calls_the_same_command_line(two: tuple[Path, list[str]], tmp_path: Path) -> None:
    path, given = two
    assert program(path, *given, f"sweep={tmp_path / 'sweep.yaml'}").returncode == 0
    sweep = yaml.safe_load((tmp_path / "sweep.yaml").read_text())
    assert sweep["method"] == "grid" and sweep["parameters"] == {"run": {"values": [0, 1]}}
    # What wandb's own agent makes of the command for one run.
    arguments = create_sweep_command_args({"args": {"run": {"value": 1}}})
    command = create_sweep_command(sweep["command"])
    spelled = [part for item in command for part in (arguments["args_no_hyphens"] if "${args" in item else [item])]
    assert spelled == ["segvol-pl", "grid", str(path), *given, "run=1"]
