"""Checks of what is given to the algorithm: a wrong value gets a ``ValueError`` that names it and says what is allowed."""

import math
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs

#: The largest finite number in single precision, in which networks compute.
FLOAT_MAX = float(np.finfo(np.float32).max)

#: The packages that decide which numbers a run gives
PACKAGES = ("sb3-reinforce", "stable-baselines3", "sb3_contrib", "rl_zoo3", "torch", "gymnasium", "mujoco", "numpy")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """
    Look up the versions of Python and of packages.

    :param packages: Names of the packages
    :return: Versions by name, Python's first; ``"?"`` for a package that is not installed
    """
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # Used without being installed
            found[name] = "?"
    return found


def check_number(
    name: str, value: Any, low: float, high: float = math.inf, integer: bool = False, or_else: str | None = None
) -> None:
    """
    :param name: Name of the argument
    :param value: What was given
    :param low: Smallest value allowed
    :param high: Largest value allowed
    :param integer: Whether it must be an integer
    :param or_else: What else is allowed, for the message
    :raises ValueError: If the value is not such a number
    """
    kinds = (int, np.integer) if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        noun = "an integer" if integer else "a number"
        raise ValueError(f"{name}={value!r} must be {noun} in [{low}, {high}]{f', or {or_else}' if or_else else ''}")


def check_finite(name: str, values: VecEnvObs, n_steps: int) -> None:
    """
    :param name: What the values are, for the message
    :param values: One value per environment, or a dict of them
    :param n_steps: Step of the rollout, for the message
    :raises ValueError: If a value is NaN or infinite in single precision, in which networks compute
    """
    if isinstance(values, dict):
        for array in values.values():
            check_finite(name, array, n_steps)
        return
    assert isinstance(values, np.ndarray)
    if values.dtype.kind != "f":
        return
    # The quickest way to rule it out: NaN is not less than anything
    if np.vdot(values, values) <= FLOAT_MAX:
        return
    finite = np.abs(values) <= FLOAT_MAX
    if not finite.all():
        env_idx = int(np.argwhere(~finite)[0, 0])
        raise ValueError(
            f"The {name} of environment {env_idx} at step {n_steps} of the rollout is not finite: "
            f"{values[env_idx]}. Observations and rewards must be finite numbers in single precision "
            "(VecCheckNan tells which wrapper they come from). The parameters are those from before the rollout."
        )
