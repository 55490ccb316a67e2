"""The random numbers of a phantom, which may vary less than they could.

With a smaller `variation` ranges are narrower around their middles, and what is unusual is rarer: a partial scan, an
artefact, a missing organ, a contrast phase that is not the most frequent one. Lesions, noise, and the smooth fields
that bend and roughen a body stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class Draws:
    """Draws from a generator; with `variation` 1 exactly what the generator draws.

    Args:
        rng: the phantom's own.
        variation: from 0 to 1.
    """

    def __init__(self, rng: np.random.Generator, variation: float) -> None:
        self._rng, self._variation = rng, variation
        self.integers, self.standard_normal = rng.integers, rng.standard_normal

    def uniform(self, low: Any = 0.0, high: Any = 1.0, size: Any = None) -> Any:
        """Draw from a range, narrowed to its middle."""
        drawn = self._rng.uniform(low, high, size)
        if self._variation == 1:
            return drawn
        middle = (np.asarray(low) + high) / 2
        return middle + self._variation * (drawn - middle)

    def unusual(self, share: float) -> bool:
        """Whether something unusual is there, which is so in `share` of the phantoms at full variation."""
        return bool(self._rng.random() < share * self._variation)

    def present(self, share: float) -> bool:
        """Whether something is there, which is so in `share` of the phantoms at every variation."""
        return bool(self._rng.random() < share)

    def choice(self, values: Sequence[Any], shares: Sequence[float] | None = None) -> Any:
        """Draw one of the values; with a smaller variation more often the most frequent one, the first if all are."""
        drawn = self._rng.choice(len(values), p=shares)
        if self._variation < 1 and self._rng.random() >= self._variation:
            drawn = 0 if shares is None else int(np.argmax(shares))
        return values[drawn]
