"""How often `scaling mix` recovers a planted law of mixtures, and how often it claims one in pure noise.

python benchmarks/mixtures.py [TRIALS] [NOISE]      # 100 trials with 1 % noise: about a minute on one core

A trial has 12 mixtures of 3 sources, one run each, and losses of a known law times log-normal noise. The law counts as
recovered if the laws of all three losses are supported, and the proposed mixture's true mean loss is within 1 % of the
least one. The table gives how often each entry of the transfer matrix lay within its 95 % interval.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from mixtures import SOURCES, trials


def main(count: int = 100, noise: float = 0.01) -> None:
    """Print the figures."""
    found = trials(count, noise)
    assert found.covered is not None and found.given is not None
    print(f"planted law, {count} trials, noise {noise:.1%}:")
    print(f"  recovered {found.recovered}; all laws supported {found.supported}; proposal near {found.proposed}")
    for row, target in enumerate(SOURCES):
        cells = [f"{found.covered[row, column]}/{found.given[row, column]}" for column in range(len(SOURCES))]
        print(f"  transfer to the loss on {target} within its interval: {'  '.join(cells)}")
    pure = trials(count, noise, effect=False)
    print(f"pure noise, {count} trials: any law claimed {pure.any_law}; any mixture proposed {pure.any_proposal}")


if __name__ == "__main__":
    main(*(kind(text) for kind, text in zip((int, float), sys.argv[1:], strict=False)))
