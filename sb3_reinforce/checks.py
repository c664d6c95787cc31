"""Checks of what a user gives: a wrong value gets an error that names it and says what is allowed."""

import difflib
import math
import platform
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs

Init = TypeVar("Init", bound=Callable[..., None])

#: The largest finite number in single precision, in which networks compute.
FLOAT_MAX = float(np.finfo(np.float32).max)

#: The packages that decide which numbers a run computes.
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


def closest(name: str, names: Sequence[str]) -> str:
    """
    Find the name that a user may have meant.

    :param name: Name that was given
    :param names: Names that are allowed
    :return: The most similar one
    """
    return difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]


def check_choice(name: str, value: Any, allowed: Collection[Any]) -> None:
    """
    Check an argument that takes one of a few values.

    :param name: Name of the argument
    :param value: Value that was given
    :param allowed: Values that are allowed
    :raises ValueError: If the value is not among them
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")


def check_number(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    integer: bool = False,
    or_else: str | None = None,
    or_none: bool = False,
) -> None:
    """
    Check an argument that takes a finite number.

    :param name: Name of the argument
    :param value: Value that was given
    :param low: Smallest value allowed
    :param high: Largest value allowed
    :param integer: Whether the number must be an integer
    :param or_else: What else is allowed, for the message
    :param or_none: Whether ``None`` is allowed too
    :raises ValueError: If the value is not such a number
    """
    if or_none:
        if value is None:
            return
        or_else = "None"
    kind = Integral if integer else Real
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= float(value) <= high or math.isinf(value):
        noun = "an integer" if integer else "a number"
        upper = f"{high}]" if math.isfinite(high) else "inf)"
        raise ValueError(f"{name}={value!r} must be {noun} in [{low}, {upper}{f', or {or_else}' if or_else else ''}")


def check_schedule(name: str, value: Any, low: float = 0, or_none: bool = False) -> None:
    """
    Check an argument that takes a finite number or a schedule.

    :param name: Name of the argument
    :param value: Value that was given
    :param low: Smallest value allowed
    :param or_none: Whether ``None`` is allowed too
    :raises ValueError: If the value is none of these
    """
    if not callable(value) and not (or_none and value is None):
        or_else = f"a function of the progress remaining{', or None' if or_none else ''}"
        check_number(name, value, low, or_else=or_else)


def to_schedule(value: float | Schedule) -> FloatSchedule:
    """
    Make a schedule of an argument that can be one.

    :param value: A number of any kind, or a schedule
    :return: Function of the progress remaining
    """
    return FloatSchedule(value if callable(value) else float(value))


def evaluate(name: str, value: float | Schedule, progress: float) -> float:
    """
    Evaluate an argument that can be a schedule.

    :param name: Name of the argument
    :param value: Its value
    :param progress: Progress remaining, from 1 to 0
    :return: Its value at this time of the training
    :raises ValueError: If this is negative or not finite
    """
    now = to_schedule(value)(progress)
    if not 0 <= now < math.inf:
        raise ValueError(f"{name}={now} must be in [0, inf) (progress {progress:g})")
    return now


def check_finite(name: str, values: VecEnvObs, n_steps: int) -> None:
    """
    Check that numbers from the environments are finite in single precision, in which networks compute.

    :param name: What the values are, for the message
    :param values: One value per environment, or a dict of them
    :param n_steps: Step of the rollout, for the message
    :raises ValueError: If a value is NaN or infinite
    """
    if isinstance(values, dict):
        for array in values.values():
            check_finite(name, array, n_steps)
        return
    assert isinstance(values, np.ndarray)
    if values.dtype.kind != "f":
        return
    # The fastest test that all values are finite: a comparison with NaN is False
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


def explain_unknown_arguments(hints: dict[str, str]) -> Callable[[Init], Init]:
    """
    Make a decorator of constructors, which says what takes the place of an argument that other algorithms have.

    :param hints: What to say, by the name of the argument
    :return: The decorator
    """

    def decorate(init: Init) -> Init:
        @wraps(init)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            for name in hints.keys() & kwargs.keys():
                raise TypeError(f"{type(self).__name__} has no argument {name!r}: {hints[name]}")
            init(self, *args, **kwargs)

        return checked  # type: ignore[return-value]

    return decorate
