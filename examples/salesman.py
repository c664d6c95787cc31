"""
Learn to plan tours through random cities: every episode is a problem of its own, episodes of a group share one, and cities
that have been visited are masked.

    python -m examples.salesman --minutes 5
"""

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from scipy.optimize import LinearConstraint, milp
from scipy.sparse.csgraph import connected_components

from examples import scoring
from examples.scoring import HELD_OUT, Deadline, of_model
from sb3_reinforce import REINFORCE


class Salesman(gym.Env):
    """
    A tour through cities that are drawn uniformly from the unit square, from the first one and back to it. The reward is the
    negative length of each leg; the last city's is that of the way back, too.

    :param n_cities: Number of cities
    """

    def __init__(self, n_cities: int = 20):
        self.n_cities = n_cities
        self.observation_space = spaces.Box(-np.inf, np.inf, (n_cities, 9), np.float32)
        self.action_space = spaces.Discrete(n_cities)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.cities = self.np_random.random((self.n_cities, 2))
        self.distances = np.linalg.norm(self.cities[:, None] - self.cities, axis=2)
        self.tour = [0]
        self.is_left = np.arange(self.n_cities) > 0
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        if not self.is_left[action]:
            raise ValueError(f"City {action} has been visited: action_masks() tells which have not")
        length = self.distances[self.tour[-1], action]
        self.tour.append(int(action))
        self.is_left[action] = False
        is_over = len(self.tour) == self.n_cities
        if is_over:
            length += self.distances[action, 0]
        return self._observation(), -float(length), is_over, False, {}

    def action_masks(self) -> np.ndarray:
        """
        Tell which cities have not been visited.

        :return: Whether each city can be next, shape ``(n_cities,)``
        """
        return self.is_left

    def _observation(self) -> np.ndarray:
        """Where each city is, seen from the last one, and how far from the cities that are left."""
        here, left = self.tour[-1], self.distances + np.where(self.is_left, 0, 2)
        np.fill_diagonal(left, 2)
        nearest = np.minimum(np.partition(left, 2, axis=1)[:, :3], 2)
        columns = [
            self.is_left,
            self.cities[:, 0] - self.cities[here, 0],
            self.cities[:, 1] - self.cities[here, 1],
            self.distances[here],
            self.distances[0],
            *nearest.T,
            self.distances @ self.is_left / max(1, self.is_left.sum()),
        ]
        return np.stack(columns, axis=1).astype(np.float32)


def optimum(distances: np.ndarray) -> float:
    """
    Find the length of the shortest tour, by integer programming: subtours are cut off until there are none (Dantzig, Fulkerson
    & Johnson, Solution of a large-scale traveling-salesman problem, 1954).

    :param distances: Distances, shape ``(n_cities, n_cities)``
    :return: The length
    """
    n = len(distances)
    first, second = np.triu_indices(n, 1)
    of_city = np.array([(first == city) | (second == city) for city in range(n)], dtype=float)
    constraints = [LinearConstraint(of_city, 2, 2)]
    while True:
        solution = milp(distances[first, second], integrality=np.ones(len(first)), bounds=(0, 1), constraints=constraints)
        chosen = solution.x > 0.5
        graph = np.zeros((n, n))
        graph[first[chosen], second[chosen]] = 1
        n_tours, tour_of = connected_components(graph, directed=False)
        if n_tours == 1:
            return float(solution.fun)
        inside = np.array([(tour_of[first] == tour) & (tour_of[second] == tour) for tour in range(n_tours)], dtype=float)
        constraints.append(LinearConstraint(inside, -np.inf, np.bincount(tour_of) - 1))


def nearest_neighbour(env: Salesman) -> int:
    """
    Go to the nearest city that is left.

    :param env: The environment
    :return: The city
    """
    return int(np.where(env.is_left, env.distances[env.tour[-1]], np.inf).argmin())


def lengths(choose: Any, n_cities: int, seeds: Any = HELD_OUT) -> np.ndarray:
    """
    Measure tours.

    :param choose: Function that takes the environment and its observation, and gives the next city
    :param n_cities: Number of cities
    :param seeds: Seeds of the problems
    :return: Length of the tour of each problem
    """
    env, found = Salesman(n_cities), []
    for seed in seeds:
        observation, _ = env.reset(seed=seed)
        total, is_over = 0.0, False
        while not is_over:
            observation, reward, is_over, _, _ = env.step(choose(env, observation))
            total -= reward
        found.append(total)
    return np.array(found)


def optima(n_cities: int, seeds: Any = HELD_OUT) -> np.ndarray:
    """
    Find the lengths of the shortest tours.

    :param n_cities: Number of cities
    :param seeds: Seeds of the problems
    :return: Length of the shortest tour of each problem
    """
    env, found = Salesman(n_cities), []
    for seed in seeds:
        env.reset(seed=seed)
        found.append(optimum(env.distances))
    return np.array(found)


def make_model(n_cities: int = 20, seed: int = 0, **kwargs: Any) -> REINFORCE:
    """
    Make the model of this example.

    :param n_cities: Number of cities
    :param seed: Seed
    :param kwargs: Other arguments of ``REINFORCE``
    :return: The model
    """
    return scoring.make_model(Salesman, {"n_cities": n_cities}, seed, **kwargs)


def main() -> None:
    """Train, and compare the tours with the shortest ones and with those of the nearest neighbour."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cities", type=int, default=20, help="number of cities")
    parser.add_argument("--minutes", type=float, default=5, help="minutes of training")
    args = parser.parse_args()
    best = optima(args.cities)
    deadline = Deadline(60 * args.minutes)
    model = make_model(args.cities, target_kl=deadline.falling(0.05)).learn(10**9, callback=deadline)
    print(f"{model.num_timesteps} steps, {len(best)} held-out problems: shortest tour {best.mean():.3f}")
    for name, choose in (("REINFORCE", of_model(model)), ("nearest neighbour", lambda env, _: nearest_neighbour(env))):
        mean = lengths(choose, args.cities).mean()
        print(f"{name}: {mean:.3f}, {mean / best.mean() - 1:.1%} longer")


if __name__ == "__main__":
    main()
