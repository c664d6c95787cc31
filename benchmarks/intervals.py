"""Intervals of means over a few runs."""

import numpy as np
from scipy.stats import bootstrap


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """
    Estimate the 95 % interval of a mean: percentiles of the bootstrap.

    :param values: One value of each run, two or more
    :return: Both ends
    """
    found = bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", random_state=0).confidence_interval
    return float(found.low), float(found.high)
