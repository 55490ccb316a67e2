"""A random crop with its label by segvol_pl's stream and by other loaders, from the same voxels, in one run.

    python benchmarks/peers.py OUT [--env VENV] [--minutes 11] [--only NAME,...] [--write docs/reference/performance.md]
    python benchmarks/peers.py OUT --small --only segvol_pl,decoding   # seconds, to try the script out

1. OUT/env gets the peers, at the versions of peers-requirements.txt; --env names an environment that has them.
2. OUT gets the corpus: phantoms enlarged to 200 x 400 x 400 voxels with 13 categories and noise, packed by segvol_pl.
   The peers get the voxels that segvol_pl packed, each in its own format. What OUT holds already is kept.
3. Rounds: each loader in turn, in a process of its own, pinned to one core, with one thread and a warm page cache. Each
   opens its format, has a few samples compared with the raw arrays, and draws samples for some seconds. Then segvol_pl
   on both cores at once.
4. Medians over the rounds as a table; --write puts it between the markers of a page. What could not be installed,
   converted or opened is listed with the reason.

The loaders are in peers_loaders.py, segvol_pl's own in peers_own.py, a turn in peers_turn.py.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from json import dumps, loads
from pathlib import Path
from typing import IO, Any

import nibabel
import numpy as np
import peers_own
import yaml
from peers_turn import DONE, Corpus, form_of
from results import Column, host, markdown, record, write_between
from rich.console import Console
from rich.table import Table

from segvol_pl.atomic import write_text
from segvol_pl.config import PackConfig
from segvol_pl.data.corpus import rng_of
from segvol_pl.data.sampling import window_start
from segvol_pl.data.schema import Member
from segvol_pl.data.shard_index import load_index
from segvol_pl.data.shard_reader import read_array, read_facts
from segvol_pl.data.store import Store
from segvol_pl.imaging.box import box_slices
from segvol_pl.imaging.intensity import body_box, intensity_of
from segvol_pl.packing.pack import pack
from segvol_pl.packing.phantom import make_phantom
from segvol_pl.packing.phantom_anatomy import CATEGORIES

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "peers-requirements.txt"
OWN = "segvol_pl"
INSTALLED = ".installed"
"""A file that is written last into the environment of the peers."""
NOISE = 12.0
"""Standard deviation in HU of the noise added, so that the CT compresses about 2:1, as a scan does."""
WINDOWS = 500
"""Windows drawn of each volume."""


@dataclass(frozen=True)
class Size:
    """How large a run is."""

    volumes: int
    shape: tuple[int, int, int]
    window: tuple[int, int, int]
    categories: int
    seconds: float
    """Of a turn."""
    scale: float
    """Of the phantoms before they are enlarged."""
    workers: int
    """Processes that pack; 0 for one per core."""


FULL = Size(volumes=6, shape=(200, 400, 400), window=(32, 256, 256), categories=13, seconds=3.0, scale=1.0, workers=0)
SMALL = Size(volumes=2, shape=(24, 72, 72), window=(8, 32, 32), categories=3, seconds=0.2, scale=0.4, workers=1)


@dataclass(frozen=True)
class Row:
    """A loader and what it promises, by its code and documentation."""

    title: str
    checked: str
    """Which of the bytes read are compared with a checksum."""
    order: str
    once: str
    """Whether an epoch gives every sample exactly once."""
    resume: str
    """Whether a run can go on in the middle of an epoch."""
    mapped: bool = False
    """Whether its files are mapped, so that what it reads is not counted."""


_OWN = (
    *("all", "permutation of all, pure function of seed and epoch"),
    *("yes, in any world", "to the sample, in other worlds too"),
)
_NNUNET = ("no", "random with replacement", "no", "no")
_MONAI = ("no", "torch's RandomSampler", "yes", "no")
ROWS = {
    OWN: Row("**segvol_pl, stream**", *_OWN),
    "nnunet-class": Row("nnU-Net's data set class, int16, normalised by hand", *_NNUNET, mapped=True),
    "nnunet-loader": Row("nnU-Net's class and its loader, float32", *_NNUNET, mapped=True),
    "tensorstore": Row("tensorstore, sharded zarr v3", "a shard's index (crc32c)", "a format, no order", "–", "–"),
    "litdata": Row(
        "litdata, complete volumes, raw", "no", "chunks shuffled, then within", "yes", "state_dict", mapped=True
    ),
    "mosaicml-streaming": Row(
        "mosaicml-streaming, complete volumes, raw",
        "a shard at download, if chosen",
        "py1e within canonical nodes, seeded",
        "yes, padded to equal ranks",
        "yes, elastic",
    ),
    "webdataset": Row("webdataset, raw .npy in tar", "no", "shards, then a buffer", "not with equal ranks", "no"),
    "monai-cache": Row("MONAI CacheDataset, all in memory", *_MONAI),
    "monai-cache-indices": Row("MONAI CacheDataset, places of labels too", *_MONAI),
    "monai-persistent": Row("MONAI PersistentDataset", *_MONAI),
    "monai-persistent-indices": Row("MONAI PersistentDataset, places of labels too", *_MONAI),
    "segvol_pl-everything": Row("segvol_pl, all that SegVol needs, 8 categories", *_OWN),
    "decoding": Row("decoding and normalising alone, from memory", "no", "–", "–", "–"),
}

Figures = dict[str, Any]


@dataclass
class Found:
    """What the rounds gave."""

    turns: dict[str, list[Figures]] = field(default_factory=dict)
    """Loader -> its figures, a dict for each round; aligned with those of segvol_pl."""
    together: dict[str, list[float]] = field(default_factory=dict)
    """Loader -> the rate of two processes at once, of twice the rate of one, for each round."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Loader -> why it was left out."""


# ---- the corpus ----


def write_cases(folder: Path, size: Size) -> PackConfig:
    """Phantoms cut to the body and enlarged to the size by nearest neighbour, with noise, as NIfTI files."""
    for number in range(size.volumes):
        phantom = make_phantom(number, size.scale, variation=0.0)
        body = box_slices(body_box(phantom.hu_DHW, intensity_of(phantom.hu_DHW)))
        noise_DHW = np.random.default_rng(number).normal(0, NOISE, size.shape)
        for role, array_DHW in (("ct", phantom.hu_DHW[body]), ("seg", phantom.label_DHW[body])):
            places = (np.arange(new) * old // new for new, old in zip(size.shape, array_DHW.shape, strict=True))
            grown_DHW = array_DHW[np.ix_(*places)]
            grown_DHW = (grown_DHW + noise_DHW).astype(np.int16) if role == "ct" else grown_DHW
            path = folder / role / f"v{number}_{role}.nii"
            path.parent.mkdir(parents=True, exist_ok=True)
            # From (d, h, w) = (superior, anterior, right) to the file's (right, anterior, superior).
            nibabel.save(nibabel.Nifti1Image(grown_DHW.transpose(2, 1, 0), np.eye(4)), path)
    named = dict(list(CATEGORIES.items())[: size.categories])
    (folder / "categories.yaml").write_text(yaml.safe_dump(named))
    return PackConfig(
        images=str(folder / "ct"),
        labels=str(folder / "seg"),
        categories=str(folder / "categories.yaml"),
        out=str(folder / "packed"),
        overview_shape=list(size.window),
        test_fraction=0.0,
        workers=size.workers,
    )


def prepare(folder: Path, size: Size) -> Corpus:
    """The corpus of a size, unless it is there. corpus.json is written last."""
    corpus = Corpus(folder)
    if (folder / "corpus.json").exists() and corpus.facts["size"] == loads(dumps(asdict(size))):
        return corpus
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "raw").mkdir(parents=True)
    config = write_cases(folder / "cases", size)
    pack(config)
    shards = form_of(corpus, peers_own.Crops())
    shards.parent.mkdir()
    Path(config.out).rename(shards)
    (shards / DONE).touch()
    shutil.rmtree(folder / "cases")
    facts = describe(Store(shards), folder / "raw", size)
    write_text(folder / "corpus.json", dumps(facts))
    return Corpus(folder)


def describe(store: Store, raw: Path, size: Size) -> dict[str, Any]:
    """Write the packed voxels as raw arrays, and return the facts of the corpus, see `peers_turn.Corpus`."""
    volumes, windows = {}, {}
    for number, sample in enumerate(load_index(store).samples):
        facts = read_facts(store, sample)
        for role, member in (("ct", Member.CT), ("label", Member.LABEL)):
            np.save(raw / f"{sample.key}.{role}.npy", read_array(store, sample, facts, member)[:])
        names = sorted(facts.categories)
        volumes[sample.key] = {
            "shape": facts.shape,
            "low": facts.intensity.low,
            "high": facts.intensity.high,
            "anchors": {facts.categories[name].values[0]: facts.categories[name].anchors for name in names},
        }
        rng = rng_of(number)
        drawn = [names[rng.integers(len(names))] for _ in range(WINDOWS)]
        windows[sample.key] = [window_start(facts, name, size.window, rng) for name in drawn]
    return {"size": asdict(size), "window": size.window, "volumes": volumes, "windows": windows}


# ---- the processes ----


def installed(folder: Path) -> tuple[Path, str]:
    """The interpreter of the peers' environment, and why it is not complete; it is made unless it is there."""
    python = folder / "bin" / "python"
    if (folder / INSTALLED).exists():
        return python, ""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    torch = next(line for line in REQUIREMENTS.read_text().splitlines() if line.startswith("torch=="))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch brings what its build needs. The file lists all else: some peers' own bounds exclude each other.
    for what in ([torch], ["--no-deps", "--requirement", str(REQUIREMENTS)]):
        done = subprocess.run([*pip, *what], capture_output=True, text=True)
        if done.returncode:
            return python, f"pip: {last_line(done.stderr)}"
    # Each turn starts a process: where Python writes no bytecode, it would compile every time.
    subprocess.run([str(python), "-m", "compileall", "-qq", "-j", "0", "-x", "/tests?/", str(folder / "lib")])
    (folder / INSTALLED).touch()
    return python, ""


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2] or "no message"


@dataclass(frozen=True)
class Processes:
    """Starts loaders in processes of their own."""

    corpus: Corpus
    peers: Path
    """The interpreter of the peers' environment."""

    def start(self, what: str, name: str, *arguments: object) -> subprocess.Popen[str]:
        own = name in peers_own.LOADERS
        script = HERE / ("peers_own.py" if own else "peers_loaders.py")
        command = [sys.executable if own else str(self.peers), str(script), what, str(self.corpus.folder), name]
        one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLOSC_NTHREADS", "NUMBA_NUM_THREADS"), "1")
        # A file, not a pipe: a library that prints much would wait for ever.
        errors = (self.corpus.folder / f"{name}.log").open("w+")
        pipe = subprocess.PIPE
        environment = {**os.environ, **one}
        return subprocess.Popen(
            [*command, *map(str, arguments)], stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment
        )

    def convert(self, name: str) -> str:
        """Convert the corpus for a loader. Returns why that failed."""
        process = self.start("convert", name)
        process.communicate()
        return self.failure(name) if process.returncode else ""

    def failure(self, name: str) -> str:
        return last_line((self.corpus.folder / f"{name}.log").read_text(errors="replace"))

    def turns(self, name: str, seconds: float, cores: Sequence[int]) -> list[Figures]:
        """The figures of one process on each core, which draw at the same time. Empty if one of them failed."""
        started = [self.start("turn", name, seconds, core) for core in cores]
        ready = [_stdout(process).readline() == "ready\n" for process in started]
        answers = []
        for process in started:
            _tell(process)
        for process in started:
            answers.append(process.communicate()[0])
        failed = not all(ready) or any(process.returncode for process in started)
        return [] if failed else [loads(answer) for answer in answers]


def _stdout(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout


def _tell(process: subprocess.Popen[str]) -> None:
    """Let it measure, if it still runs."""
    assert process.stdin is not None
    try:
        process.stdin.write("\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass


# ---- the rounds ----


def rounds(processes: Processes, names: Sequence[str], size: Size, ends: float, most: int) -> Found:
    """Every loader in turn, round after round, until the time is over; at least two rounds."""
    found = Found()
    for name in names:
        if problem := processes.convert(name):
            found.left_out[name] = f"convert: {problem}"
    cores = sorted(os.sched_getaffinity(0))
    took = 0.0
    for number in range(most):
        began = time.monotonic()
        if number >= 2 and began + took > ends:
            break
        for name in names:
            if name not in found.left_out:
                one_turn(processes, found, name, size, cores)
        took = time.monotonic() - began
        print(f"round {number + 1}: {took:.0f} s", file=sys.stderr)
    return found


def one_turn(processes: Processes, found: Found, name: str, size: Size, cores: Sequence[int]) -> None:
    """A turn of a loader alone, and for those of segvol_pl one on two cores at once."""
    alone = processes.turns(name, size.seconds, cores[-1:])
    if not alone:
        found.left_out[name] = processes.failure(name)
        return
    found.turns.setdefault(name, []).extend(alone)
    if name in peers_own.LOADERS and len(cores) > 1:
        both = processes.turns(name, size.seconds, cores[:2])
        rate = sum(1000 / figures["wall_ms"] for figures in both)
        found.together.setdefault(name, []).append(rate * alone[0]["wall_ms"] / 2000)


# ---- the report ----

SECTION = """## Compared with other loaders

`python benchmarks/peers.py OUT --write docs/reference/performance.md` wrote this table. All loaders give an image
float32 in [0, 1] and its label map, from the same voxels, which are compared before each turn. CPU time is user and
system time of a process with one core and one thread, the page cache warm. The peers draw the windows that segvol_pl
drew; nnU-Net's loader and MONAI draw their own. What the peers promise is read from their code and documentation, not
tested. Peak memory holds whatever a library imports; nnU-Net's class and tensorstore import no torch."""

COLUMNS = [
    Column("loader", right=False),
    Column("version", right=False),
    *(Column(name) for name in ("CPU ms a sample", "of segvol_pl", "wall ms", "MB read", "MB a volume", "peak MiB")),
    *(Column(name, right=False) for name in ("checked", "order", "each once", "resume")),
]


def middle(turns: Iterable[Figures], figure: str) -> float:
    return statistics.median(turn[figure] for turn in turns)


def cells_of(name: str, turns: list[Figures], own: list[Figures]) -> list[str]:
    row, cpu = ROWS[name], [turn["cpu_ms"] for turn in turns]
    ratios = [turn["cpu_ms"] / ours["cpu_ms"] for turn, ours in zip(turns, own, strict=False)]
    return [
        row.title,
        str(turns[0]["version"]),
        f"{statistics.median(cpu):.1f} ({min(cpu):.1f}–{max(cpu):.1f})",
        f"{statistics.median(ratios):.2f}" if ratios else "",
        f"{middle(turns, 'wall_ms'):.1f}",
        "mapped" if row.mapped else f"{middle(turns, 'read_mb'):.1f}",
        f"{middle(turns, 'stored_mb'):.0f}",
        f"{middle(turns, 'peak_mib'):.0f}",
        *(row.checked, row.order, row.once, row.resume),
    ]


def lines_of(found: Found) -> list[str]:
    """What the table does not hold."""
    lines = [
        f"{ROWS[name].title}: two processes at once give {statistics.median(shares):.2f} "
        f"({min(shares):.2f}–{max(shares):.2f}) of twice the rate of one."
        for name, shares in found.together.items()
    ]
    return lines + [f"Left out: {ROWS[name].title} ({why})." for name, why in found.left_out.items()]


def report(found: Found, size: Size, out: Path, page: str) -> None:
    own = found.turns.get(OWN, [])
    table = [cells_of(name, turns, own) for name, turns in found.turns.items()]
    most = max((len(turns) for turns in found.turns.values()), default=0)
    shape, window = (" x ".join(map(str, axes)) for axes in (size.shape, size.window))
    heading = (
        f"A crop of {window} with its label, from volumes of {shape} voxels, one core of {host()['processor']}, "
        f"medians of {most} rounds (range):"
    )
    shown = Table(title=heading)
    for column in COLUMNS:
        shown.add_column(column.name, justify="right" if column.right else "left")
    for cells in table:
        shown.add_row(*cells)
    console = Console(width=200)
    console.print(shown)
    for line in lines_of(found):
        console.print(line)
    write_text(out / "found.json", dumps(asdict(found), indent=2))
    if page:
        bullets = [f"- {line}" for line in lines_of(found)]
        write_between(Path(page), "peers", [SECTION, "", heading, "", *markdown(COLUMNS, table), "", *bullets])
        together = {f"{name}, two at once": shares for name, shares in found.together.items()}
        record("peers", {name: middle(turns, "cpu_ms") for name, turns in found.turns.items()} | together)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--env", type=Path, help="environment of the peers, default OUT/env")
    parser.add_argument("--minutes", type=float, default=11.0, help="no round starts that would end later, default 11")
    parser.add_argument("--rounds", type=int, default=9, help="at most, default 9")
    parser.add_argument("--only", default="", help=f"comma-separated, of {', '.join(ROWS)}")
    parser.add_argument("--small", action="store_true", help="tiny volumes")
    parser.add_argument("--write", default="", help="a page with the table's markers, which is given the table")
    arguments = parser.parse_args()
    ends, size = time.monotonic() + 60 * arguments.minutes, SMALL if arguments.small else FULL
    names = arguments.only.split(",") if arguments.only else list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"--only: no {', '.join(unknown)}; there are {', '.join(ROWS)}")
    corpus = prepare(arguments.out.resolve() / ("small" if arguments.small else "full"), size)
    python, problem = Path(sys.executable), ""
    if arguments.env:
        python = arguments.env / "bin" / "python"
    elif set(names) - set(peers_own.LOADERS):
        python, problem = installed(arguments.out / "env")
    if problem:
        print(f"the peers' environment is incomplete: {problem}", file=sys.stderr)
    found = rounds(Processes(corpus, python), names, size, ends, arguments.rounds)
    report(found, size, corpus.folder, arguments.write)


if __name__ == "__main__":
    main()
