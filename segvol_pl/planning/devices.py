"""Accelerators by name: peak rates of dense matrix products in bf16 and float32, and memory. Imports nothing heavy.

Figures are the makers' data sheets', without sparsity (where a sheet states only the sparse rate, half of it).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """One device as the trainer sees it."""

    name: str
    tflops: float
    """Dense bf16 products, TFLOP/s."""
    fp32_tflops: float
    """float32 products, TFLOP/s; not those of TF32, which a run takes with run.tf32 alone."""
    gib: float
    """Memory, GiB."""
    known_by: tuple[str, ...]
    """Parts of the name that torch gives it, all of them, in lower case."""

    def peak(self, bf16: bool) -> float:
        """TFLOP/s in bf16, or else in float32."""
        return self.tflops if bf16 else self.fp32_tflops


# More telling names first. For B200's float32 both 75 and 80 are found: the lower one is taken.
ACCELERATORS = (
    Accelerator("h100-pcie", 756, 51, 80, ("h100", "pcie")),  # nvidia.com/h100: 1513 sparse
    Accelerator("h100-nvl", 835, 60, 94, ("h100", "nvl")),  # nvidia.com/h100: 1671 sparse
    Accelerator("h100", 989, 67, 80, ("h100",)),  # SXM; nvidia.com/h100: 1979 sparse
    Accelerator("h200-nvl", 835, 60, 141, ("h200", "nvl")),  # nvidia.com/h200: 1671 sparse
    Accelerator("h200", 989, 67, 141, ("h200",)),  # SXM; nvidia.com/h200: 1979 sparse
    Accelerator("gh200", 989, 67, 96, ("gh200",)),  # nvidia.com/grace-hopper-superchip: 1979 sparse
    Accelerator("b200", 2250, 75, 180, ("b200",)),  # nvidia.com/dgx-b200: 36 PFLOP/s sparse bf16 for 8
    Accelerator("a100-40gb", 312, 19.5, 40, ("a100", "40gb")),  # nvidia.com/a100
    Accelerator("a100", 312, 19.5, 80, ("a100",)),  # nvidia.com/a100
    Accelerator("a40", 150, 37.4, 48, ("a40",)),  # nvidia.com/a40: 149.7
    Accelerator("a30", 165, 10.3, 24, ("a30",)),  # nvidia.com/a30
    Accelerator("l40s", 362, 91.6, 48, ("l40s",)),  # nvidia.com/l40s: 362.05
    Accelerator("l4", 121, 30.3, 24, ("l4",)),  # nvidia.com/l4: 242 sparse
    Accelerator("mi300x", 1307, 163.4, 192, ("mi300x",)),  # amd.com/mi300x: 1307.4
)


def accelerator(name: str) -> Accelerator | None:
    """By its name here, or by the one that torch gives the device; None where it is not known."""
    wanted = name.lower()
    exact = next((one for one in ACCELERATORS if one.name == wanted), None)
    # Whole words: l4 is a part of l40s, h200 of gh200.
    words = set(wanted.replace("-", " ").split())
    return exact or next((one for one in ACCELERATORS if set(one.known_by) <= words), None)
