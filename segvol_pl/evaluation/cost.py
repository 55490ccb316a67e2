"""Measure the cost of a prediction: its time and its peak memory."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PEAK_RESIDENT = "5"
"""Written to `RESET`, this makes Linux reset the peak of resident memory."""
MEBI = 2**20


@dataclass
class CostMeter:
    """Measures a `with` block."""

    device: torch.device
    seconds: float = 0.0
    memory_mb: float | None = None
    """Peak in MiB: on a GPU of torch's memory, else of the process. None without a GPU on systems other than Linux."""

    def __enter__(self) -> CostMeter:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):
                RESET.write_text(PEAK_RESIDENT)
        self._start = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.memory_mb = torch.cuda.max_memory_allocated(self.device) / MEBI
        else:
            self.memory_mb = _peak_resident()
        self.seconds = time.perf_counter() - self._start


def _peak_resident() -> float | None:
    with suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return None
