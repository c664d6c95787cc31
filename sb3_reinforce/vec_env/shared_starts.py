"""Episodes that share a start: resets with seeds that are known beforehand."""

from collections import deque
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils.env_checker import data_equivalence
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_reinforce.checks import check_finite

#: Seed and options of a reset
Start = tuple[int, dict[str, Any] | None]


class SharedStarts(gym.Wrapper):
    """
    Reset an environment with seeds that wait in a queue, also where a vectorized environment resets it by itself, which drops
    seeds otherwise (https://github.com/DLR-RM/stable-baselines3/issues/1790).

    ``REINFORCE(..., group_size=4)`` puts it around the environments of a ``DummyVecEnv`` by itself. Those of a
    ``SubprocVecEnv`` are out of its reach: ``make_vec_env(..., wrapper_class=SharedStarts)``.

    :param env: Environment
    """

    def __init__(self, env: gym.Env):
        self._starts: deque[Start] = deque()
        super().__init__(env)

    def __setattr__(self, name: str, value: Any) -> None:
        # SB3's set_attr sets what it is given on the outermost wrapper, which was another one without this
        if name.startswith("_") or name == "env" or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            setattr(self.env, name, value)

    def queue_starts(self, starts: Sequence[Start]) -> None:
        """
        Set how the next episodes start.

        :param starts: Seed and options of each of the next resets. A reset with a seed of its own forgets those that are left
        """
        self._starts = deque(starts)

    def forget_starts(self) -> None:
        """Forget all starts that are left but the last one, which no other environment has."""
        self._starts = deque(list(self._starts)[-1:])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self._starts.clear()
        elif self._starts:
            seed, options = self._starts.popleft()
        return super().reset(seed=seed, **({"options": options} if options else {}))


def share_starts(env: VecEnv) -> None:
    """
    Make sure that the environments of a vectorized environment can be told their starts.

    :param env: A vectorized environment
    :raises ValueError: If they are out of reach
    """
    base = env.unwrapped
    if any(env.env_is_wrapped(EpisodicLifeEnv)):
        raise ValueError(
            "Episodes cannot share a start where the loss of a life ends them, as the next one goes on from there: "
            "make_atari_env(..., wrapper_kwargs=dict(terminal_on_life_loss=False))"
        )
    if isinstance(base, DummyVecEnv):
        base.envs = [each if each.has_wrapper_attr("queue_starts") else SharedStarts(each) for each in base.envs]
    elif not (isinstance(base, SubprocVecEnv) and env.has_attr("queue_starts")):
        raise ValueError(
            f"Episodes that share a start need resets with seeds, and those of {type(base).__name__} are out of reach: take a "
            "DummyVecEnv, or a SubprocVecEnv of wrapped environments: make_vec_env(..., wrapper_class=SharedStarts) with "
            "sb3_reinforce.vec_env.shared_starts.SharedStarts"
        )


def check_starts(env: VecEnv, options: Callable[[int], dict[str, Any]] | None = None) -> None:
    """
    Check that an episode's start is a function of the seed of its reset, by two resets of the first environment and one of the
    last.

    :param env: A vectorized environment, which has to be reset afterwards
    :param options: Function that gives the options of a reset for its seed
    :raises ValueError: If two starts with one seed differ, are not finite, or the options are no dictionary
    """
    arguments: dict[str, Any] = {"seed": 0} | ({"options": options(0)} if options else {})
    if not isinstance(arguments.get("options", {}), dict):
        raise ValueError(f"group_options(0)={arguments['options']!r} must be a dictionary")
    indices = (0, 0, env.num_envs - 1)
    # Copies, as some environments return the same array each time
    first, *others = [deepcopy(env.env_method("reset", indices=index, **arguments)[0][0]) for index in indices]
    parts = first if isinstance(first, dict) else {"": first}
    check_finite("observation", {name: np.asarray(part)[None] for name, part in parts.items()}, 0)
    if not all(data_equivalence(first, other, exact=True) for other in others):
        raise ValueError(
            "Two resets with the same seed have given different observations, so that no two episodes can share a start: "
            "the environment has to draw its start from self.np_random, after super().reset(seed=seed)"
        )
