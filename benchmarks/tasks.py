"""
Small tasks on which a policy gradient can go wrong, registered with Gymnasium: short episodes, noisy rewards, a reward that is
known only at the end, states that look alike.

    import benchmarks.tasks
    gymnasium.make("Bandit-v0")
"""

from itertools import permutations
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from scipy.ndimage import label


class Bandit(gym.Env):
    """
    Ten arms; episodes of one step. The reward of arm ``a`` is ``means[a]`` plus standard normal noise.
    """

    observation_space = spaces.Box(0, 1, (1,))
    action_space = spaces.Discrete(10)
    means = np.random.default_rng(0).normal(size=10)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return np.ones(1, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward = self.means[action] + self.np_random.normal()
        return np.ones(1, dtype=np.float32), float(reward), True, False, {}


class Parity(gym.Env):
    """
    Two random bits, which stay visible, and as many steps: the actions are to be the bits' parity. The reward comes at the
    end, 1 if both are.
    """

    observation_space = spaces.MultiBinary(3)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.bits, self.time, self.is_right = self.np_random.integers(2, size=2), 0, True
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.is_right &= bool(action == self.bits.sum() % 2)
        self.time += 1
        is_over = self.time == 2
        return self._observation(), float(is_over and self.is_right), is_over, False, {}

    def _observation(self) -> np.ndarray:
        return np.array([*self.bits, self.time > 0], dtype=np.int8)


class Corridor(gym.Env):
    """
    The short corridor with switched actions of Sutton & Barto, example 13.1: three states that look alike, in the second of
    which the actions are reversed; -1 for each step. The best policy goes right with probability 0.59 and earns -11.6; a
    deterministic policy never gets out, and is stopped by a time limit.
    """

    observation_space = spaces.Box(0, 1, (1,))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.place = 0
        return np.ones(1, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        goes_right = (action == 1) != (self.place == 1)
        self.place = max(0, self.place + (1 if goes_right else -1))
        return np.ones(1, dtype=np.float32), -1.0, self.place == 3, False, {}


class Salesman(gym.Env):
    """
    A tour through six cities from the first one and back. The reward is the negative length of the tour, at its end; -10, also
    at the end, for going to a city twice.
    """

    n_cities = 6
    cities = np.random.default_rng(0).random((n_cities, 2))
    observation_space = spaces.Dict(visited=spaces.MultiBinary(n_cities), here=spaces.Discrete(n_cities))
    action_space = spaces.Discrete(n_cities)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self.tour = [0]
        return self._observation(), {}

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        if action in self.tour:
            return self._observation(), -10.0, True, False, {}
        self.tour.append(int(action))
        is_over = len(self.tour) == self.n_cities
        return self._observation(), -self.length(self.tour) if is_over else 0.0, is_over, False, {}

    def _observation(self) -> dict:
        visited = np.isin(np.arange(self.n_cities), self.tour).astype(np.int8)
        return {"visited": visited, "here": self.tour[-1]}

    @classmethod
    def length(cls, tour: list[int]) -> float:
        """
        Measure a tour.

        :param tour: All cities, in the order in which they are visited
        :return: The length of the closed tour
        """
        places = cls.cities[tour]
        return float(np.linalg.norm(places - np.roll(places, 1, axis=0), axis=1).sum())

    @classmethod
    def shortest(cls) -> float:
        """
        Try all tours.

        :return: The length of the shortest one
        """
        return min(cls.length([0, *rest]) for rest in permutations(range(1, cls.n_cities)))


class RandomMaze(gym.Env):
    """
    A maze of its own for every episode: a fifth of the cells are walls, start and goal lie at random in one part of it; -1 for
    each step. The observation is what surrounds the walker, and the direction of the goal.

    :param size: Cells along each side
    :param sight: How many cells the walker sees in each direction
    """

    #: Right, down, left, up
    moves = np.array([[0, 1], [1, 0], [0, -1], [-1, 0]])
    action_space = spaces.Discrete(4)

    def __init__(self, size: int = 7, sight: int = 2):
        self.size, self.sight = size, sight
        self.observation_space = spaces.Box(-1, 1, ((2 * sight + 1) ** 2 + 2,))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.place = self.goal = np.zeros(2, dtype=int)
        while (self.place == self.goal).all():
            is_free = self.np_random.random((self.size, self.size)) > 0.2
            part_of, n_parts = label(is_free)
            if n_parts:
                largest = np.bincount(part_of[is_free]).argmax()
                self.place, self.goal = self.np_random.choice(np.argwhere(part_of == largest), 2)
        self.is_wall = np.pad(~is_free, self.sight, constant_values=True)
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        place = self.place + self.moves[action]
        if not self.is_wall[tuple(place + self.sight)]:
            self.place = place
        return self._observation(), -1.0, bool((self.place == self.goal).all()), False, {}

    def _observation(self) -> np.ndarray:
        (row, column), width = self.place, 2 * self.sight + 1
        around = self.is_wall[row : row + width, column : column + width]
        return np.array([*around.ravel(), *(self.goal - self.place) / self.size], dtype=np.float32)


class TMaze(gym.Env):
    """
    A corridor with a junction at its end (Bakker, Reinforcement learning with long short-term memory, 2001). A sign, which is
    shown in the first step only, says whether the left or the right way out is rewarded with 4; the other one ends the episode
    with -0.1. In the corridor, action 0 goes forward; the others stay, and cost 0.1.

    :param length: Steps from the sign to the junction
    """

    observation_space = spaces.Box(0, 1, (3,))
    #: Forward, left, right
    action_space = spaces.Discrete(3)

    def __init__(self, length: int = 20):
        self.length = length

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.sign, self.place, self.is_shown = int(self.np_random.integers(2)), 0, True
        self.ways_out = self._ways_out()
        return self._observation(), {}

    def _ways_out(self) -> list[int]:
        return [1, 2]

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.is_shown = False
        if action == 0 and self.place < self.length:
            self.place += 1
            return self._observation(), 0.0, False, False, {}
        is_out = self.place == self.length and action > 0
        return self._observation(), 4.0 if is_out and action == self.ways_out[self.sign] else -0.1, bool(is_out), False, {}

    def _observation(self) -> np.ndarray:
        sign = self.is_shown * np.eye(2)[self.sign]
        return np.array([*sign, self.place == self.length], dtype=np.float32)


class MaskedTMaze(TMaze):
    """
    A T-maze with seven doors, two of which are open in an episode. Only the mask tells which; the sign says whether the first
    or the second of them is rewarded, and the other doors end the episode with -0.1.
    """

    action_space = spaces.Discrete(8)

    def _ways_out(self) -> list[int]:
        return sorted(1 + self.np_random.choice(7, size=2, replace=False))

    def action_masks(self) -> np.ndarray:
        """
        Tell which actions are valid.

        :return: Forward in the corridor, the open doors at its end
        """
        valid = np.zeros(8, dtype=bool)
        valid[self.ways_out if self.place == self.length else 0] = True
        return valid


def make_flat(env_id: str, **kwargs: Any) -> gym.Env:
    """
    Make an environment whose observations are vectors: SB3 knows no tuples.

    :param env_id: Id of the environment
    :param kwargs: Its arguments
    :return: The environment
    """
    return gym.wrappers.FlattenObservation(gym.make(env_id, **kwargs))


gym.register("Bandit-v0", Bandit)
gym.register("Parity-v0", Parity)
gym.register("Corridor-v0", Corridor, max_episode_steps=200)
gym.register("Salesman-v0", Salesman)
gym.register("RandomMaze-v0", RandomMaze, max_episode_steps=100)
gym.register("TMaze-v0", TMaze, max_episode_steps=100)
gym.register("MaskedTMaze-v0", MaskedTMaze, max_episode_steps=100)
gym.register("FlatBlackjack-v1", make_flat, kwargs={"env_id": "Blackjack-v1"})
