"""What is installed: a wheel away from the repository, an environment without the optional packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, distribution, distributions, packages_distributions
from pathlib import Path

import pytest
from factories import DEMO_FILES
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from segvol_pl import resources
from segvol_pl.__main__ import COMMANDS
from segvol_pl.config import BUNDLED
from segvol_pl.config.loader import load
from segvol_pl.errors import ConfigError

ROOT = Path(__file__).parents[1]
BARE = ("lightning", "numba", "scipy", "torch", "transformers")
"""What docs/how-to/air-gapped.md takes a machine to have, and BESIDE."""
BESIDE = ("einops", "httpx", "matplotlib", "msgpack", "psutil", "requests")
WHEELHOUSE = 19 * 2**20
"""Bytes at most."""
OPTIONAL = (
    "aiohttp",
    "bokeh",
    "deepspeed",
    "fire",
    "highdicom",
    "mlflow",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "s3fs",
    "tensorboard",
    "wandb",
)
HEAVY = {"lightning", "matplotlib", "monai", "numpy", "omegaconf", "rich", "scipy", "torch", "transformers", *OPTIONAL}


def in_repository(name: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / name).rglob("*") if path.is_file()}


def environment(folder: Path, without: Collection[str] = ()) -> Path:
    """The `bin` of a virtual environment with all that this one has installed but for `without` and segvol_pl."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    made_by = packages_distributions()
    gone = {"segvol_pl", *(part for name in without for each in made_by.get(name, [name]) for part in top_level(each))}
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        # A .pth may lead to the repository.
        if entry.name not in gone and not entry.name.startswith(("segvol_pl-", "__")) and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    return folder / "bin"


def top_level(name: str) -> set[str]:
    """Files and folders in site-packages that a distribution consists of."""
    try:
        return {file.parts[0] for file in distribution(name).files or ()}
    except PackageNotFoundError:
        return set()


def needed_by(names: Collection[str]) -> set[str]:
    """Those distributions and all that they ask for, by their canonical names."""
    found: set[str] = set()
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            asked = map(Requirement, distribution(name).requires or [])
            waiting += [
                canonicalize_name(one.name) for one in asked if not one.marker or one.marker.evaluate({"extra": ""})
            ]
    return found


def run(command: list[str | Path], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**kept, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


# ---- the wheel ----


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    done = run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], ROOT)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that the wheel is installed in and that knows no repository."""
    scripts = environment(tmp_path_factory.mktemp("elsewhere") / "env")
    pip = [sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--quiet", "--no-index", "--no-deps"]
    done = run([*pip, wheel], scripts)
    assert done.returncode == 0, done.stderr
    return scripts


def test_the_wheel_holds_the_package_and_what_is_shipped_and_nothing_else(wheel: Path) -> None:
    held = {name for name in names(wheel) if ".dist-info/" not in name}
    code = {name for name in in_repository("segvol_pl") if name.endswith((".py", ".html.j2"))}
    assert {name for name in code if name.endswith(".j2")}
    beside = {f"segvol_pl/_shipped/{path}" for name in BUNDLED for path in in_repository(name)}
    assert len(beside) > 50
    assert held == code | beside


def test_an_image_is_given_what_the_wheel_is_made_of(wheel: Path, tmp_path: Path) -> None:
    """The container's first stage, without the container: what is copied, and let through, builds the same wheel."""
    ignored = (ROOT / "container/Dockerfile.dockerignore").read_text().splitlines()
    for line in (ROOT / "container/Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            *sources, target = line.split()[1:]
            for source in sources:
                assert f"!{source}" in ignored
                place = tmp_path / "source" / (source if target == "./" else target)
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / source, place)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist"]
    assert run(build, tmp_path / "source").returncode == 0
    assert names(tmp_path / "dist" / wheel.name) == names(wheel)


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return set(opened.namelist())


def test_what_was_installed_lays_out_a_folder_to_work_in(installed: Path, tmp_path: Path) -> None:
    program = installed / "segvol-pl"
    where = run([installed / "python", "-c", "import segvol_pl; print(segvol_pl.__file__)"], tmp_path)
    assert where.stdout.startswith(str(installed.parent))
    done = run([program, "init", "my lab"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "my lab holds configs/" in done.stdout and len(done.stdout.splitlines()) <= 4
    lab = tmp_path / "my lab"
    for name in BUNDLED:
        assert {path.relative_to(lab).as_posix() for path in (lab / name).rglob("*") if path.is_file()} == (
            in_repository(name)
        )
    shown = run([program, "config", "train", "configs/tiny/train.yaml"], lab)
    assert (
        shown.returncode == 0 and "hidden_size: 128" in shown.stdout
    )  # which the file that it names as its model says
    again = run([program, "init", "."], lab)
    assert again.returncode == 2 and "configs/ablations/data.yaml exists already" in again.stderr


SBATCH = {
    "pack": ("configs/tiny/pack.yaml", "out"),
    "pretrain": ("configs/tiny/pretrain.yaml", "data.shards"),
    "train": ("configs/tiny/train.yaml", "data.shards"),
    "evaluate": ("configs/tiny/evaluate.yaml", "checkpoint"),
    "grid": ("configs/ablations/data.yaml", "data.shards"),
}
SLURM = {
    "SLURM_ARRAY_JOB_ID": "7",
    "SLURM_ARRAY_TASK_COUNT": "1",
    "SLURM_ARRAY_TASK_ID": "0",
    "SLURM_ARRAY_TASK_MAX": "0",
    "SLURM_ARRAY_TASK_MIN": "0",
    "SLURM_CPUS_PER_TASK": "1",
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "job",
    "SLURM_JOB_NODELIST": "node",
    "SLURM_NNODES": "1",
    "SLURM_NTASKS_PER_NODE": "1",
}
SRUN = """#!/bin/sh
while case "$1" in --*) ;; *) false ;; esac; do shift; done
exec "$@"
"""


@pytest.mark.parametrize("command", SBATCH)
def test_laid_out_scripts_find_environment_and_program(command: str, installed: Path, tmp_path: Path) -> None:
    """Submitted from a shell that knows no environment; srun only starts what it is given."""
    lab, tools = tmp_path / "lab", tmp_path / "tools"
    assert run([installed / "segvol-pl", "init", lab], tmp_path).returncode == 0
    tools.mkdir()
    (tools / "srun").write_text(SRUN)
    (tools / "srun").chmod(0o755)
    file, key = SBATCH[command]
    done = run(["bash", f"slurm/{command}.sbatch", file], lab, **SLURM, PATH=f"{tools}:/usr/bin:/bin")
    assert done.returncode == 2
    # It came to the program, by the configuration beside it: that lacks what only users know.
    assert f"segvol-pl {command}: error: " in done.stderr and f"{key}=" in done.stderr


@pytest.mark.slow
def test_the_demo_runs_from_a_wheel(installed: Path, tmp_path: Path) -> None:
    steps = ["volumes=8", "scale=0.4", "pretrain_steps=2", "train_steps=2", "out=demo"]
    done = run([installed / "segvol-pl", "demo", *steps], tmp_path)
    assert done.returncode == 0, done.stderr
    assert [part for part in DEMO_FILES if not (tmp_path / "demo" / part).exists()] == []
    commit = json.loads((tmp_path / "demo/train/manifest.json").read_text())["commit"]
    assert commit == "unknown"  # no repository is near


# ---- laying out ----


def test_nothing_is_laid_out_where_a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "env.sh").write_text("mine")
    with pytest.raises(ConfigError, match=r"slurm/env\.sh exists already: move .*slurm away"):
        resources.lay_out(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["slurm"]
    assert (tmp_path / "slurm" / "env.sh").read_text() == "mine"


def test_it_is_laid_out_beside_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "shards" / "mine").mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    resources.lay_out(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"configs", "slurm", "shards"}
    assert {path.name for path in (tmp_path / "shards").iterdir()} == {"datasets", "mine"}


def test_what_cannot_be_moved_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "shards" / "datasets" / "odd").mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot be written"):
        resources.lay_out(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_a_configuration_that_is_not_here_is_laid_out_by_init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (["configs/train.yaml"], ["model=configs/model/small.yaml"]):
        with pytest.raises(ConfigError, match=r"no such file: segvol-pl init DIR lays out configs/$"):
            load("train", arguments)
    with pytest.raises(ConfigError, match=r"elsewhere/train\.yaml: no such file$"):
        load("train", ["elsewhere/train.yaml"])


# ---- what is not imported ----


def test_help_imports_nothing_heavy() -> None:
    source = f"""
import contextlib, io, sys
from segvol_pl.__main__ import COMMANDS, main
for command in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([command, "--help"]) == 0, command
    found = {HEAVY!r} & set(sys.modules)
    assert not found, (command, found)
print(len(COMMANDS))
"""
    done = run([sys.executable, "-c", source], ROOT)
    assert (done.stdout, done.stderr) == (f"{len(COMMANDS)}\n", "")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment without any optional package."""
    return environment(tmp_path_factory.mktemp("bare") / "env", without=OPTIONAL)


def training(shards: Path, out: Path) -> list[str]:
    model = [
        "model.patch_size=[4, 8, 8]",
        "model.hidden_size=16",
        "model.num_layers=1",
        "model.num_heads=2",
        "model.decoder_heads=2",
    ]
    data = ["data.workers=0", "data.global_batch=2", f"data.shards={shards}", "prompts.pseudo_per_volume=0"]
    run = ["optim.max_steps=2", f"run.out={out}", "track.wandb=disabled"]
    return ["train", "configs/tiny/train.yaml", "model.input_shape=[8, 16, 16]", *model, *data, *run]


def test_what_needs_an_optional_package_names_it(bare: Path, phantom_shards: Path, tmp_path: Path) -> None:
    """In one process, which has imported every module before."""
    asked = {
        "the viewer needs bokeh: pip install 'segvol_pl[viewer]'": [
            "view",
            "ct.nii.gz",
            "checkpoint=model.safetensors",
        ],
        "the server needs aiohttp: pip install 'segvol_pl[serve]'": ["serve", "checkpoint=model.safetensors"],
        "s3://bucket/shards/index.json: needs a package that is not installed": ["inspect", "s3://bucket/shards"],
        "http://localhost:9/index.json: needs a package that is not installed": ["inspect", "http://localhost:9"],
        "needs wandb, which is not installed: pip install wandb": ["scaling", "fit", "wandb:me/project/group"],
        "zero2 needs DeepSpeed: pip install 'segvol_pl[deepspeed]'": [
            *training(phantom_shards, tmp_path),
            "run.strategy=zero2",
        ],
    }
    source = f"""
import importlib, importlib.util, json, pkgutil, sys
import segvol_pl
from segvol_pl.__main__ import main
assert not any(map(importlib.util.find_spec, {OPTIONAL!r}))
for module in pkgutil.walk_packages(segvol_pl.__path__, "segvol_pl."):
    importlib.import_module(module.name)
print(*(main(arguments) for arguments in json.loads(sys.argv[1])))
"""
    done = run([bare / "python", "-c", source, json.dumps(list(asked.values()))], ROOT)
    assert done.stdout == "1 1 1 1 1 2\n", done.stderr
    complaints = [line for line in done.stderr.splitlines() if line.startswith("segvol-pl ")]
    for line, wanted in zip(complaints, asked, strict=True):
        assert wanted in line and "pip install" in line


@pytest.mark.slow
def test_training_goes_without_optional_packages(bare: Path, phantom_shards: Path, tmp_path: Path) -> None:
    """wandb among them, though it is asked for: that is said once."""
    done = run([bare / "python", "-m", "segvol_pl", *training(phantom_shards, tmp_path), "track.wandb=auto"], ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wandb is not installed: the run continues without it") == 1
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


# ---- without SimpleITK, and without a package index ----


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with nothing but what a machine that reaches no package index is taken to have."""
    kept = needed_by([*BARE, *BESIDE])
    gone = {each.metadata["Name"] for each in distributions()}
    gone = {name for name in gone if canonicalize_name(name) not in kept}
    return environment(tmp_path_factory.mktemp("machine") / "env", without=gone)


def test_without_simpleitk_only_what_reads_ct_files_is_refused(
    phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In one process, which has imported every module before."""
    folder = tmp_path_factory.mktemp("without")
    scripts = environment(folder / "env", without=("simpleitk",))
    cts = phantom_shards.parent
    sources = [f"images={cts / 'images'}", f"labels={cts / 'labels'}", f"categories={cts / 'categories.yaml'}"]
    asked = [["inventory", f"images={cts / 'images'}", "out="], ["pack", *sources, f"out={folder / 'shards'}"]]
    allowed = [["inspect", str(phantom_shards)], training(phantom_shards, folder / "run")]
    source = """
import importlib, importlib.util, json, pkgutil, sys
import segvol_pl
from segvol_pl.__main__ import main
assert importlib.util.find_spec("SimpleITK") is None
for module in pkgutil.walk_packages(segvol_pl.__path__, "segvol_pl."):
    importlib.import_module(module.name)
codes = [main(arguments) for arguments in json.loads(sys.argv[1])]
print(codes)
"""
    done = run([scripts / "python", "-c", source, json.dumps([*asked, *allowed])], ROOT)
    assert done.stdout.endswith("[2, 2, 0, 0]\n"), done.stderr
    complaints = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(complaints) == len(asked)
    for line in complaints:
        assert "is missing" in line and "pip install SimpleITK" in line
    assert not (folder / "shards").exists()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_wheelhouse_is_all_that_an_air_gapped_machine_lacks(
    machine: Path, phantom_shards: Path, tmp_path: Path
) -> None:
    """The demo's stages over shards that were packed elsewhere, by the commands of docs/how-to/air-gapped.md."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    made = run(["make", "wheelhouse", f"PYTHON={version}", f"WHEELHOUSE={tmp_path / 'wheels'}"], ROOT)
    assert made.returncode == 0, made.stderr
    wheels = sorted((tmp_path / "wheels").glob("*.whl"))
    assert sum(wheel.stat().st_size for wheel in wheels) < WHEELHOUSE
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--python", machine / "python", "install", "--quiet", "--no-index", "--no-deps"]
    done = run([*pip, "--target", site, *wheels], tmp_path)
    assert done.returncode == 0, done.stderr

    def program(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run([machine / "python", "-m", "segvol_pl", *arguments], tmp_path, PYTHONPATH=str(site))

    assert program("init", str(tmp_path / "lab")).returncode == 0
    tiny, out = tmp_path / "lab" / "configs" / "tiny", tmp_path / "run"
    common = [f"data.shards={phantom_shards}", "data.workers=0", "data.global_batch=2"]
    small = training(phantom_shards, out)[2:8]
    commands = {
        "pretrain": [str(tiny / "pretrain.yaml"), *small, *common, "optim.max_steps=2", f"run.out={out / 'pretrain'}"],
        "train": [str(tiny / "train.yaml"), *small, *common, "optim.max_steps=2", f"run.out={out / 'train'}"],
        "export": [str(out / "train" / "checkpoints" / "last.ckpt"), str(out / "model.safetensors")],
        "evaluate": [
            str(tiny / "evaluate.yaml"),
            f"checkpoint={out / 'model.safetensors'}",
            f"data.shards={phantom_shards}",
            f"out={out / 'evaluation'}",
        ],
    }
    for command, arguments in commands.items():
        done = program(command, *arguments)
        assert done.returncode == 0, (command, done.stderr)
    assert (out / "evaluation" / "report.html").exists()
