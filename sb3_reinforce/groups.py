"""Which episodes of a rollout share their start."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from sb3_reinforce.parallel.processes import on_first
from sb3_reinforce.quota import EpisodeQuota
from sb3_reinforce.vec_env.shared_starts import Start


def draw_seeds(n: int) -> list[int]:
    """
    Draw seeds, the same in all processes.

    :param n: Number of seeds
    :return: The seeds
    """
    return on_first(lambda: np.random.randint(2**31 - 1, size=n).tolist())


class Groups:
    """
    Divide the episodes of a rollout into groups that share a start, in the order of their numbers.

    :param quota: The episodes of the rollout
    :param size: Number of sampled episodes of a group; 1 without a greedy one is no division
    :param with_greedy: Whether each group has a greedy episode besides, its first
    """

    def __init__(self, quota: EpisodeQuota, size: int, with_greedy: bool):
        self._quota, self._size, self._with_greedy = quota, size + with_greedy, with_greedy
        self.are_shared = self._size > 1
        #: Number of greedy episodes of all processes
        self.n_greedy = quota.n_episodes // self._size if with_greedy else 0
        #: Whether each environment plays a greedy episode now, shape ``(n_envs,)``; ``None`` if there are none
        self.greedy: np.ndarray | None = None
        if with_greedy:
            self.greedy = np.array([self._is_greedy(numbers[0]) for numbers in quota.numbers])

    def _is_greedy(self, number: int) -> bool:
        return self._with_greedy and number % self._size == 0

    def queue(self, env: VecEnv, options: Callable[[int], dict[str, Any]] | None) -> None:
        """
        Draw the seed of each group, and tell the environments the starts of their episodes.

        :param env: The environment, whose next reset is the first start
        :param options: Function that gives the options of a reset for its seed
        """
        shared = self._draw(self._quota.n_episodes // self._size, options)
        # Without a last start of their own, environments of one group would go on with the same random numbers
        last = self._draw(self._quota.total_envs, options)[self._quota.first_env :]
        for env_idx, numbers in enumerate(self._quota.numbers):
            starts = [*(shared[number // self._size] for number in numbers), last[env_idx]]
            env.env_method("queue_starts", deepcopy(starts), indices=env_idx)
        env.unwrapped._reset_seeds()  # Of the environment itself, which would come first

    @staticmethod
    def _draw(n: int, options: Callable[[int], dict[str, Any]] | None) -> list[Start]:
        return [(seed, options(seed) if options else None) for seed in draw_seeds(n)]

    def finish(self, env_idx: int) -> dict[str, Any]:
        """
        Tell what kind of an episode an environment has paid just now.

        :param env_idx: Index of the environment
        :return: Its group, and whether it was greedy
        """
        number = self._quota.number(env_idx)
        if self.greedy is not None:
            following = self._quota.numbers[env_idx]
            following = following[following > number]
            self.greedy[env_idx] = len(following) > 0 and self._is_greedy(following[0])
        return {"group": number // self._size if self.are_shared else 0, "is_greedy": self._is_greedy(number)}
