"""Checks of hyperparameters, as they stand in the files of RL Zoo, before an environment is created."""

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

from rl_zoo3.utils import ALGOS, linear_schedule
from stable_baselines3.common.type_aliases import Schedule

from sb3_reinforce.arguments import HINTS, check_arguments
from sb3_reinforce.checks import check_number, closest
from sb3_reinforce.reinforce import REINFORCE
from sb3_reinforce.zoo.hyperparams_opt import target_kl_schedule

#: What an entry can hold besides the arguments of the algorithm
ZOO_KEYS = {
    "callback",
    "env_kwargs",
    "env_wrapper",
    "frame_stack",
    "monitor_kwargs",
    "n_envs",
    "n_timesteps",
    "noise_std",
    "noise_type",
    "normalize",
    "vec_env_wrapper",
}

#: Arguments of the algorithm that have an option of the command line, or none
NOT_IN_AN_ENTRY = {"_init_setup_model", "device", "env", "seed", "tensorboard_log", "verbose"}

#: Where RL Zoo takes ``lin_0.1``
SCHEDULES = ("learning_rate", "clip_range", "clip_range_vf", "delta_std")

#: The schedules of REINFORCE that RL Zoo does not know
REINFORCE_SCHEDULES: dict[str, Callable[[float], Schedule]] = {
    "target_kl": target_kl_schedule,
    "value_learning_rate": linear_schedule,
    "ent_coef": linear_schedule,
}


def check_keys(
    given: Collection[str], allowed: Collection[str], what: str, hints: Mapping[str, str] = MappingProxyType({})
) -> None:
    """
    Check that keys are known.

    :param given: Keys to check
    :param allowed: Keys that can be
    :param what: What the keys are, for the message
    :param hints: What takes the place of keys of other algorithms
    :raises ValueError: If a key is not allowed; names the closest one that is
    """
    for key in sorted(given, key=str):
        if key not in allowed:
            hint = f": {hints[key]}" if key in hints else f", did you mean {closest(str(key), sorted(allowed))!r}?"
            raise ValueError(f"{key!r} is not {what}{hint}")


def check_entry(algo: str, entry: dict[str, Any], where: str) -> None:
    """
    Check the keys of an entry, and the numbers of time steps and environments.

    :param algo: Name of the algorithm
    :param entry: Its hyperparameters
    :param where: Where the entry is from, for the message
    :raises ValueError: If a key is unknown or missing, or one of the numbers cannot be
    """
    arguments = inspect.signature(ALGOS[algo]).parameters.keys() - NOT_IN_AN_ENTRY
    hints = HINTS if algo == "reinforce" else {}
    check_keys(entry, arguments | ZOO_KEYS, f"a hyperparameter of {algo}", hints)
    for key in ("policy", "n_timesteps"):
        if key not in entry:
            raise ValueError(f"{key!r} is missing from the hyperparameters of {where}")
    check_number("n_timesteps", entry["n_timesteps"], 1)
    check_number("n_envs", entry.get("n_envs", 1), 1, integer=True)


def convert_schedules(algo: str, entry: dict[str, Any]) -> None:
    """
    Check the schedules of an entry, such as ``lin_0.1``, and convert those that RL Zoo does not know.

    :param algo: Name of the algorithm
    :param entry: Its hyperparameters, in which schedules take the place of texts
    :raises ValueError: If a text is no schedule, or its key takes none
    """
    known = [*SCHEDULES, *(REINFORCE_SCHEDULES if algo == "reinforce" else ())]
    for key, value in entry.items():
        if not isinstance(value, str) or not (key in known or value.startswith("lin_")):
            continue
        if key not in known:
            raise ValueError(f"{key}={value!r} must be a number: it takes no schedule, as {', '.join(known)} do")
        if not re.fullmatch(r"lin_[0-9.]+(e[+-]?[0-9]+)?", value):
            raise ValueError(f"{key}={value!r} must be a number, or 'lin_' and the number where it starts to fall")
        if key in REINFORCE_SCHEDULES:
            entry[key] = REINFORCE_SCHEDULES[key](float(value.removeprefix("lin_")))


def check_reinforce(hyperparams: dict[str, Any]) -> None:
    """
    Check the arguments of REINFORCE and of its policy, without an environment.

    :param hyperparams: Arguments of the algorithm
    :raises ValueError: If one of them cannot be
    """
    model = REINFORCE(env=None, _init_setup_model=False, **hyperparams)  # type: ignore[arg-type]
    check_arguments(model)
    # A policy hands on to its base what it does not take itself
    allowed = {name for policy in model.policy_class.__mro__ for name in inspect.signature(policy).parameters}
    check_keys(model.policy_kwargs, allowed, f"an argument of {model.policy_class.__name__}")
