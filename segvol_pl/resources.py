"""What is shipped beside the code: configurations, cluster scripts, recipes of public data sets.

1. They stand at the top of the repository; a wheel carries the same folders within the package.
2. `shipped` finds a folder of them in either.
3. `lay_out` (verb `init`) copies all of them to a folder of the user's, to be edited and submitted from there.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from segvol_pl.config import BUNDLED
from segvol_pl.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent
BUNDLED_IN_WHEEL = PACKAGE / "_shipped"
"""Where a wheel carries them."""
ENVIRONMENT = """
# Where the environment that a job was submitted from has no segvol_pl: the one that `segvol-pl init` ran in.
python -c "import segvol_pl" 2>/dev/null || export PATH={bin}:"$PATH"
"""


def bundled(name: str) -> Path:
    """The folder of one of `BUNDLED`. Raises ConfigError where the installation lacks it."""
    folder = (BUNDLED_IN_WHEEL if BUNDLED_IN_WHEEL.is_dir() else PACKAGE.parent) / name
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}: the installation is not whole: install segvol-pl again")
    return folder


def lay_out(target: Path) -> list[str]:
    """Copies what is shipped into `target`, each folder whole or not at all; returns what to do next, in lines.

    Raises ConfigError, naming the first file that is there already, and then nothing is written.
    """
    _refuse_taken(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".segvol-init.", dir=target) as staging:
            _stage(Path(staging))
            _move(Path(staging), target)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be laid out ({error.strerror}): give another folder") from error
    return [
        f"{target} holds {', '.join(f'{name}/ ({_count(target / name)} files)' for name in BUNDLED)}.",
        f"Go there (cd {shlex.quote(str(target))}), write what your cluster needs into slurm/env.sh, then for example:",
        "  segvol-pl pack configs/pack.yaml images=CT_DIR labels=SEG_DIR categories=categories.yaml out=shards/mine",
        "  segvol-pl train configs/train.yaml data.shards=shards/mine run.out=runs/mine"
        "    # or: sbatch slurm/train.sbatch configs/train.yaml ...",
    ]


def _refuse_taken(target: Path) -> None:
    for folder in (target / name for name in BUNDLED):
        taken = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
        if taken:
            raise ConfigError(f"{taken[0]} is there already: move {folder} away, or give another folder")


def _stage(staging: Path) -> None:
    for name in BUNDLED:
        # Without the modes: what a system's installation holds may be read-only.
        shutil.copytree(bundled(name), staging / name, copy_function=shutil.copyfile)
    with (staging / "slurm" / "env.sh").open("a", encoding="utf-8") as stream:
        stream.write(ENVIRONMENT.format(bin=shlex.quote(str(Path(sys.executable).parent))))


def _move(staging: Path, target: Path) -> None:
    """Folder by folder; what was moved goes again where a later one cannot be."""
    moved: list[Path] = []
    try:
        for name in BUNDLED:
            (target / name).parent.mkdir(exist_ok=True)
            (staging / name).rename(target / name)
            moved.append(target / name)
    except OSError:
        for folder in moved:
            shutil.rmtree(folder)
        raise


def _count(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))
