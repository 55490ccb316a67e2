"""What starting the command line costs, held against starting Python alone.

    python benchmarks/startup.py [runs=20]

For each call, in turns with `python -c pass` within one run:

1. Milliseconds until the process ended, the fastest of the runs: other work on the machine only adds to it.
2. The ratio to `python -c pass`.
3. Milliseconds of imports: `-X importtime`'s own times summed, the fastest, without those of `python -c pass`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time

from results import record

PROGRAM = [sys.executable, "-m", "segvol_pl"]
CALLS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "segvol-pl --help": [*PROGRAM, "--help"],
    "segvol-pl predict --help": [*PROGRAM, "predict", "--help"],
    "segvol-pl train optim.max_step=1": [*PROGRAM, "train", "optim.max_step=1"],
}
OWN_TIME = re.compile(r"^import time:\s+(\d+) \|", re.MULTILINE)


def seconds(command: list[str]) -> float:
    """Of one process, start to end."""
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - start


def import_seconds(command: list[str]) -> float:
    """Of all modules that the process imports."""
    timed = [command[0], "-X", "importtime", *command[1:]]
    done = subprocess.run(timed, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    return sum(int(microseconds) for microseconds in OWN_TIME.findall(done.stderr)) / 1e6


def main(runs: int) -> None:
    taken: dict[str, list[float]] = {call: [] for call in CALLS}
    imports: dict[str, list[float]] = {call: [] for call in CALLS}
    for _ in range(runs):
        for call, command in CALLS.items():
            taken[call].append(seconds(command))
            imports[call].append(import_seconds(command))
    alone, *_ = CALLS
    record("startup", {f"{call}, ms": 1000 * min(times) for call, times in taken.items()})
    print(f"{'':34}     ms   ratio   imports, ms")
    for call in CALLS:
        ratio, own = min(taken[call]) / min(taken[alone]), min(imports[call]) - min(imports[alone])
        print(f"{call:34} {1000 * min(taken[call]):6.0f} {ratio:7.1f} {1000 * own:13.0f}")


if __name__ == "__main__":
    given = dict(argument.split("=") for argument in sys.argv[1:])
    main(int(given.get("runs", "20")))
