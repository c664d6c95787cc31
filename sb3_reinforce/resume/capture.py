"""
The state of a run between two updates: all that the rest of the run depends on, besides the model that SB3 saves.

Whole-episode rollouts can start from a reset, so that this is random generators, normalization statistics and counters of
callbacks. Numbers, texts, lists, tuples, dicts and arrays are all that a state is made of.
"""

import inspect
import random
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
)

from sb3_reinforce.callbacks import all_callbacks
from sb3_reinforce.checks import versions
from sb3_reinforce.parallel import processes
from sb3_reinforce.vec_env.normalize import statistics_of, wrappers

#: Wrappers whose state a reset sets anew, or which have none that matters
STATELESS = (VecCheckNan, VecExtractDictObs, VecFrameStack, VecMonitor, VecTransposeImage, VecVideoRecorder)


def is_plain_value(value: Any) -> bool:
    """
    Tell whether a value can be part of a state.

    :param value: A value
    :return: Whether it is a number, a text, ``None``, an array of numbers, or a list, tuple or dict of such
    """
    if isinstance(value, list | tuple):
        return all(map(is_plain_value, value))
    if isinstance(value, dict):
        return all(is_plain_value(part) for item in value.items() for part in item)
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf"
    return value is None or isinstance(value, bool | int | float | str | np.generic)


def subspaces(space: spaces.Space) -> Iterator[spaces.Space]:
    """
    Iterate over a space and those that it is made of.

    :param space: A space
    :return: The spaces
    """
    yield space
    parts = space.spaces if isinstance(space, spaces.Dict | spaces.Tuple) else ()
    for part in parts.values() if isinstance(parts, dict) else parts:
        yield from subspaces(part)


def capture_rms(rms: RunningMeanStd) -> dict[str, Any]:
    """
    Capture running statistics.

    :param rms: Running statistics
    :return: Their state
    """
    return {"mean": np.asarray(rms.mean), "var": np.asarray(rms.var), "count": rms.count}


def restore_rms(rms: RunningMeanStd, state: dict[str, Any]) -> None:
    """
    Restore running statistics.

    :param rms: Running statistics
    :param state: Result of :func:`capture_rms`
    """
    rms.mean, rms.var, rms.count = state["mean"], state["var"], state["count"]


def capture_env(env: VecEnv) -> dict[str, Any]:
    """
    Capture a vectorized environment.

    :param env: A vectorized environment that will be reset
    :return: Its state: the random generators of the environments and of their spaces, and the statistics of normalization
    """
    *outer, base = wrappers(env)
    state: dict[str, Any] = {"n_envs": env.num_envs, "normalization": []}
    for wrapper in outer:
        if isinstance(wrapper, VecNormalize):
            state["normalization"].append(
                {
                    "obs": {key: capture_rms(rms) for key, rms in statistics_of(wrapper).items()},
                    "ret": capture_rms(wrapper.ret_rms),
                    "returns": wrapper.returns,
                }
            )
        elif not isinstance(wrapper, STATELESS):
            warnings.warn(f"What {type(wrapper).__name__} remembers, if anything, is not part of the training state")
    generators: list[Any] = base.get_attr("np_random") if isinstance(base, DummyVecEnv | SubprocVecEnv) else [None]
    if not all(isinstance(generator, np.random.Generator) for generator in generators):
        warnings.warn(
            f"A random generator of {type(base).__name__} is out of reach: a resumed run gets other episodes than this one"
        )
        return state
    # Those of the next reset, which are None after it
    state["seeds"] = list(base._seeds)
    state["generators"] = [generator.bit_generator.state for generator in generators]
    state["spaces"] = []
    for name in ("observation_space", "action_space"):
        found = [[part._np_random for part in subspaces(space)] for space in base.get_attr(name)]
        states = [[generator and generator.bit_generator.state for generator in of_env] for of_env in found]
        # SB3 seeds that of the actions, whether it is used or not
        is_used = name == "observation_space" and any(generator for of_env in found for generator in of_env)
        if isinstance(base, SubprocVecEnv) and is_used:
            warnings.warn(
                f"An environment of the SubprocVecEnv samples from its {name}: this generator is out of reach in another "
                "process, and a resumed run gets other samples. DummyVecEnv can be resumed exactly"
            )
        state["spaces"].append(states)
    return state


def make_generator(state: dict[str, Any]) -> np.random.Generator:
    """
    Make a random generator.

    :param state: State of a bit generator
    :return: A generator in that state
    """
    generator = np.random.Generator(getattr(np.random, state["bit_generator"])())
    generator.bit_generator.state = state
    return generator


def restore_env(env: VecEnv, state: dict[str, Any]) -> None:
    """
    Restore a vectorized environment.

    :param env: A vectorized environment
    :param state: Result of :func:`capture_env`
    :raises ValueError: If it holds another number of environments, or is normalized in another way
    """
    if env.num_envs != state["n_envs"]:
        raise ValueError(f"The training state is of {state['n_envs']} environments, env has {env.num_envs}")
    *outer, base = wrappers(env)
    normalizers = [wrapper for wrapper in outer if isinstance(wrapper, VecNormalize)]
    if len(normalizers) != len(state["normalization"]):
        raise ValueError(
            f"The training state is of an environment with {len(state['normalization'])} VecNormalize, "
            f"env has {len(normalizers)}"
        )
    for wrapper, statistics in zip(normalizers, state["normalization"], strict=True):
        found = statistics_of(wrapper)
        if found.keys() != statistics["obs"].keys():
            saved, of_env = (", ".join(map(repr, keys)) or "none" for keys in (statistics["obs"], found))
            raise ValueError(
                f"The training state has statistics of the observations {saved}, VecNormalize of env those of {of_env}"
            )
        for key, rms in found.items():
            restore_rms(rms, statistics["obs"][key])
        restore_rms(wrapper.ret_rms, statistics["ret"])
        wrapper.returns = statistics["returns"]
    if "generators" not in state or not isinstance(base, DummyVecEnv | SubprocVecEnv):
        return
    base._seeds = state["seeds"]
    if isinstance(base, SubprocVecEnv):
        for index, generator in enumerate(state["generators"]):
            base.set_attr("np_random", make_generator(generator), indices=index)
    else:
        for found, generator in zip(base.get_attr("np_random"), state["generators"], strict=True):
            found.bit_generator.state = generator  # The object stays the same: the environment may have given it to others
        for name, states in zip(("observation_space", "action_space"), state["spaces"], strict=True):
            for space, of_env in zip(base.get_attr(name), states, strict=True):
                for part, generator in zip(subspaces(space), of_env, strict=True):
                    if generator and part._np_random is not None:
                        part._np_random.bit_generator.state = generator
                    else:
                        part._np_random = generator and make_generator(generator)


def capture_callback(callback: BaseCallback) -> dict[str, Any]:
    """
    Capture a callback.

    :param callback: A callback
    :return: Its state: attributes that are plain values and no arguments of its constructor, and environments
    """
    arguments = {name for kind in type(callback).__mro__ for name in inspect.signature(kind).parameters}
    own = {name: value for name, value in vars(callback).items() if name not in arguments or isinstance(value, VecEnv)}
    values = {name: value for name, value in own.items() if is_plain_value(value)}
    envs = {name: capture_env(value) for name, value in own.items() if isinstance(value, VecEnv)}
    return {"type": type(callback).__name__, "values": values, "envs": envs}


def restore_callback(callback: BaseCallback, state: dict[str, Any]) -> None:
    """
    Restore a callback.

    :param callback: A callback
    :param state: Result of :func:`capture_callback`
    """
    vars(callback).update(state["values"])
    for name, env_state in state["envs"].items():
        restore_env(getattr(callback, name), env_state)


def capture(model: BaseAlgorithm, callback: BaseCallback) -> dict[str, Any]:
    """
    Capture what SB3 does not save of a run.

    :param model: A model, between two updates
    :param callback: The callback that its training calls
    :return: State of the random generators, of the environment and of the callbacks
    """
    assert model.env is not None
    return {
        "time": time.time(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": th.get_rng_state().numpy(),
        "cuda": th.cuda.get_rng_state(model.device).numpy() if model.device.type == "cuda" else None,
        "env": capture_env(model.env),
        "callbacks": [capture_callback(child) for child in all_callbacks(callback)],
        # What the update before has recorded is written after the next rollout
        "logged": [
            [key, value, model.logger.name_to_excluded[key]]
            for key, value in model.logger.name_to_value.items()
            if is_plain_value(value)
        ],
    }


def check_number_of_processes(state: dict[str, Any]) -> None:
    """
    Check that a state is of as many processes as there are.

    :param state: States of the processes
    :raises ValueError: If there are not as many processes as before
    """
    if len(state["processes"]) != processes.world_size():
        raise ValueError(f"The training state is of {len(state['processes'])} processes, not {processes.world_size()}")


def restore(model: BaseAlgorithm, callback: BaseCallback, state: dict[str, Any]) -> None:
    """
    Restore what SB3 does not save of a run.

    :param model: A loaded model, whose training has been set up
    :param callback: The callback that its training calls
    :param state: Result of :func:`~sb3_reinforce.resume.archive.load_state`
    :raises ValueError: If the number of processes, the environment or the callbacks are others
    """
    assert model.env is not None
    if state["versions"] != versions():
        warnings.warn(f"The state was saved with {state['versions']}, not {versions()}: the numbers may differ from here on")
    check_number_of_processes(state)
    state = state["processes"][processes.rank()]
    callbacks = list(all_callbacks(callback))
    found, wanted = [type(child).__name__ for child in callbacks], [child["type"] for child in state["callbacks"]]
    if found != wanted:
        raise ValueError(f"The training state is of a run with the callbacks {wanted}, this one has {found}")
    restore_env(model.env, state["env"])
    for child, child_state in zip(callbacks, state["callbacks"], strict=True):
        restore_callback(child, child_state)
    for key, value, exclude in state["logged"]:
        model.logger.record(key, value, exclude)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    th.set_rng_state(th.from_numpy(state["torch"]))
    if state["cuda"] is not None and model.device.type == "cuda":
        th.cuda.set_rng_state(th.from_numpy(state["cuda"]), model.device)
