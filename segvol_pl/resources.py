"""Files that come with the code: configurations, cluster scripts, recipes of public data sets.

1. They lie at the top of the repository; a wheel carries the same folders inside the package.
2. `bundled` finds one of these folders in either place.
3. `lay_out` (command `init`) copies all of them to a folder of the user, to be edited and submitted from there.
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
"""Their place in a wheel."""
ENVIRONMENT = """
# Falls back to the environment in which `segvol-pl init` ran, if the job's own has no segvol_pl.
python -c "import segvol_pl" 2>/dev/null || export PATH={bin}:"$PATH"
"""


def bundled(name: str) -> Path:
    """Return the folder of one of `BUNDLED`. Raises ConfigError if the installation lacks it."""
    folder = (BUNDLED_IN_WHEEL if BUNDLED_IN_WHEEL.is_dir() else PACKAGE.parent) / name
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}: the installation is incomplete: install segvol-pl again")
    return folder


def lay_out(target: Path) -> list[str]:
    """Copy the bundled folders into `target`, all of them or none, and return lines that say what to do next.

    Raises ConfigError, naming the first file that exists already; nothing is written then.
    """
    _refuse_taken(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".segvol-init.", dir=target) as staging:
            _stage(Path(staging))
            _move(Path(staging), target)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror}): give another folder") from error
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
            raise ConfigError(f"{taken[0]} exists already: move {folder} away, or give another folder")


def _stage(staging: Path) -> None:
    for name in BUNDLED:
        # File modes are not copied: a system-wide installation may be read-only.
        shutil.copytree(bundled(name), staging / name, copy_function=shutil.copyfile)
    with (staging / "slurm" / "env.sh").open("a", encoding="utf-8") as stream:
        stream.write(ENVIRONMENT.format(bin=shlex.quote(str(Path(sys.executable).parent))))


def _move(staging: Path, target: Path) -> None:
    """Move folder by folder; if one cannot be moved, remove those that were."""
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
