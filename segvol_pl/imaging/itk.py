"""SimpleITK, imported where a CT's file is first read or written, not before.

Shards hold what training and evaluation need: a cluster that gets its data packed runs without SimpleITK.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import TYPE_CHECKING, Any

from segvol_pl.errors import ConfigError


@functools.cache
def simple_itk() -> ModuleType:
    """The module itself. Raises ConfigError where it cannot be imported."""
    try:
        import SimpleITK
    except ImportError as error:
        raise ConfigError(
            f"CT files are read and written by SimpleITK, which is missing ({error}): pip install SimpleITK, or pack "
            "the CTs on a machine that has it, and give the shards"
        ) from error
    # ITK warns on stderr of what `volume.py` checks, and would break the promise of one line an error.
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


class _AtFirstUse:
    def __getattr__(self, name: str) -> Any:
        return getattr(simple_itk(), name)


if TYPE_CHECKING:
    import SimpleITK as sitk
else:
    sitk = _AtFirstUse()
