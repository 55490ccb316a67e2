"""Accelerators by name: peak rates of dense matrix products in bf16 and float32, and memory.

Figures are from the vendors' data sheets, without sparsity (half the sparse rate if a sheet states only that).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """A kind of device."""

    name: str
    tflops: float
    """Dense bf16 products, TFLOP/s."""
    fp32_tflops: float
    """float32 products, TFLOP/s; not TF32, which a run uses only with run.tf32."""
    gib: float
    """Memory, GiB."""
    known_by: tuple[str, ...]
    """Words that all occur in torch's name of the device, in lower case."""

    def peak(self, bf16: bool) -> float:
        """Peak TFLOP/s in bf16, or in float32."""
        return self.tflops if bf16 else self.fp32_tflops


# More specific names first. Sources give 75 or 80 for B200's float32: this is the lower one.
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
    """Find a device by its name here or by torch's name; None if it is unknown."""
    wanted = name.lower()
    exact = next((one for one in ACCELERATORS if one.name == wanted), None)
    # Compare words: l4 is a substring of l40s, h200 of gh200.
    words = set(wanted.replace("-", " ").split())
    return exact or next((one for one in ACCELERATORS if set(one.known_by) <= words), None)
