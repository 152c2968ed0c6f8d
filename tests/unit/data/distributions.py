"""Whether two samples are of one distribution: bounds that such are beyond once in a thousand.

The draws are keyed and the references seeded, so what holds once holds always.
"""

from __future__ import annotations

import math

import numpy as np

from torchkeep.chance import ChanceKey, keyed_uniform

NUM_DRAWS = 12_000
KS_BOUND = 1.95 * math.sqrt(2 / NUM_DRAWS)


def draws_of(count: int, num_draws: int = NUM_DRAWS) -> np.ndarray:
    return keyed_uniform(ChanceKey(), "test", np.arange(num_draws), count)


def ks_distance(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference of the shares below a value. Source: Kolmogorov 1933, Smirnov 1939"""
    values = np.sort(np.concatenate([one, other]))
    shares = [np.searchsorted(np.sort(held), values, side="right") / len(held) for held in (one, other)]
    return float(np.abs(shares[0] - shares[1]).max())


def chi_squared(seen: np.ndarray, expected: float) -> float:
    return float(((seen - expected) ** 2 / expected).sum())


def most_chi_squared(freedom: int) -> float:
    """Source: Wilson & Hilferty 1931, the cube root of chi squared"""
    return freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
