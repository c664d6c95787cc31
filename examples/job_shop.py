"""
Learn to schedule jobs on machines: every episode is a problem of its own, episodes of a group share one, and jobs that are
done are masked.

    python -m examples.job_shop --minutes 5
"""

import argparse
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from examples import scoring
from examples.scoring import HELD_OUT, Deadline, of_model
from sb3_reinforce import REINFORCE

#: Machines and durations of the operations of each job: the problem "ft06" of Fisher & Thompson, Probabilistic learning
#: combinations of local job-shop scheduling rules, 1963, whose shortest schedule takes 55
FT06 = (
    ((2, 0, 1, 3, 5, 4), (1, 3, 6, 7, 3, 6)),
    ((1, 2, 4, 5, 0, 3), (8, 5, 10, 10, 10, 4)),
    ((2, 3, 5, 0, 1, 4), (5, 4, 8, 9, 1, 7)),
    ((1, 0, 2, 3, 4, 5), (5, 5, 5, 3, 8, 9)),
    ((2, 1, 4, 5, 0, 3), (9, 3, 5, 4, 3, 1)),
    ((1, 3, 5, 0, 4, 2), (3, 3, 9, 10, 4, 1)),
)
FT06_OPTIMUM = 55


class JobShop(gym.Env):
    """
    Each job is a row of operations, each on a machine of its own. An action starts the next operation of a job as soon as job
    and machine are free. The rewards of an episode add up to the lower bound of the makespan at the start less the makespan,
    in units of the longest duration times the number of machines.

    A reset draws machines and durations (1 to 10) at random, unless ``options={"jobs": ...}`` gives them in the form of
    :data:`FT06`.

    :param n_jobs: Number of jobs
    :param n_machines: Number of machines
    """

    LONGEST = 10

    def __init__(self, n_jobs: int = 6, n_machines: int = 6):
        self.n_jobs, self.n_machines = n_jobs, n_machines
        self.scale = self.LONGEST * n_machines
        self.observation_space = spaces.Box(-np.inf, np.inf, (n_jobs, 8), np.float32)
        self.action_space = spaces.Discrete(n_jobs)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if options and "jobs" in options:
            self.machines, self.durations = (np.array(part) for part in zip(*options["jobs"], strict=True))
        else:
            shape = (self.n_jobs, self.n_machines)
            self.machines = self.np_random.permuted(np.tile(np.arange(self.n_machines), (self.n_jobs, 1)), axis=1)
            self.durations = self.np_random.integers(1, self.LONGEST + 1, shape)
        self.next = np.zeros(self.n_jobs, dtype=int)
        #: When each job, and each machine, is free; and how much work each has left
        self.job_free, self.machine_free = np.zeros(self.n_jobs, dtype=int), np.zeros(self.n_machines, dtype=int)
        self.job_left = self.durations.sum(axis=1)
        self.machine_left = np.bincount(self.machines.ravel(), self.durations.ravel(), self.n_machines)
        self.bound = self._lower_bound()
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        if not self.action_masks()[action]:
            raise ValueError(f"Job {action} is done: action_masks() tells which are not")
        machine, duration = self.machines[action, self.next[action]], self.durations[action, self.next[action]]
        end = max(self.job_free[action], self.machine_free[machine]) + duration
        self.job_free[action] = self.machine_free[machine] = end
        self.job_left[action] -= duration
        self.machine_left[machine] -= duration
        self.next[action] += 1
        before, self.bound = self.bound, self._lower_bound()
        is_over = not self.action_masks().any()
        info = {"makespan": int(self.job_free.max())} if is_over else {}
        return self._observation(), float(before - self.bound) / self.scale, is_over, False, info

    def action_masks(self) -> np.ndarray:
        """
        Tell which jobs are not done.

        :return: Whether each job can be next, shape ``(n_jobs,)``
        """
        return self.next < self.n_machines

    def _lower_bound(self) -> float:
        return float(max((self.job_free + self.job_left).max(), (self.machine_free + self.machine_left).max()))

    def upcoming(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Describe the next operation of each job.

        :return: Its machine, its duration and when it can start
        """
        jobs, index = np.arange(self.n_jobs), np.minimum(self.next, self.n_machines - 1)
        machine = self.machines[jobs, index]
        return machine, self.durations[jobs, index], np.maximum(self.job_free, self.machine_free[machine])

    def _observation(self) -> np.ndarray:
        machine, duration, start = self.upcoming()
        is_left = self.action_masks()
        now = start[is_left].min() if is_left.any() else start.min()
        columns = [
            is_left * self.scale,
            duration * is_left,
            start - now,
            self.job_free - now,
            self.machine_free[machine] - now,
            self.job_left,
            self.machine_left[machine],
            self.bound - self.job_free - self.job_left,
        ]
        return (np.stack(columns, axis=1) / self.scale).astype(np.float32)


#: Dispatching rules: which job is next, the one with the lowest number
RULES: dict[str, Callable[[JobShop], np.ndarray]] = {
    "shortest operation": lambda env: env.upcoming()[1],
    "longest operation": lambda env: -env.upcoming()[1],
    "most work remaining": lambda env: -env.job_left,
    "least work remaining": lambda env: env.job_left,
    "earliest start": lambda env: env.upcoming()[2],
    "earliest end": lambda env: env.upcoming()[1] + env.upcoming()[2],
    "earliest start, then most work remaining": lambda env: env.upcoming()[2] - 1e-3 * env.job_left,
}


def by_rule(rule: Callable[[JobShop], np.ndarray]) -> Any:
    """
    Let a rule schedule.

    :param rule: One of :data:`RULES`
    :return: Function that takes the environment and its observation, and gives the next job
    """
    return lambda env, observation: int(np.where(env.action_masks(), rule(env), np.inf).argmin())


def makespans(choose: Any, n_jobs: int = 6, n_machines: int = 6, seeds: Any = HELD_OUT, jobs: Any = None) -> np.ndarray:
    """
    Measure schedules.

    :param choose: Function that takes the environment and its observation, and gives the next job
    :param n_jobs: Number of jobs
    :param n_machines: Number of machines
    :param seeds: Seeds of the problems
    :param jobs: A problem to solve instead
    :return: Makespan of each problem
    """
    env, found = JobShop(n_jobs, n_machines), []
    for seed in seeds if jobs is None else [None]:
        observation, _ = env.reset(seed=seed, options=jobs and {"jobs": jobs})
        is_over, info = False, {}
        while not is_over:
            observation, _, is_over, _, info = env.step(choose(env, observation))
        found.append(info["makespan"])
    return np.array(found)


def make_model(n_jobs: int = 6, n_machines: int = 6, seed: int = 0, **kwargs: Any) -> REINFORCE:
    """
    Make the model of this example.

    :param n_jobs: Number of jobs
    :param n_machines: Number of machines
    :param seed: Seed
    :param kwargs: Other arguments of ``REINFORCE``
    :return: The model
    """
    return scoring.make_model(JobShop, {"n_jobs": n_jobs, "n_machines": n_machines}, seed, **kwargs)


def main() -> None:
    """Train, and compare the schedules with those of dispatching rules."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=6, help="number of jobs")
    parser.add_argument("--machines", type=int, default=6, help="number of machines")
    parser.add_argument("--minutes", type=float, default=5, help="minutes of training")
    args = parser.parse_args()
    sizes = args.jobs, args.machines
    for name, rule in RULES.items():
        print(f"{name}: {makespans(by_rule(rule), *sizes).mean():.2f}")
    deadline = Deadline(60 * args.minutes)
    model = make_model(*sizes, target_kl=deadline.falling(0.05)).learn(10**9, callback=deadline)
    print(f"REINFORCE: {makespans(of_model(model), *sizes).mean():.2f} ({model.num_timesteps} steps)")
    if sizes == (6, 6):
        print(f"ft06: {makespans(of_model(model), jobs=FT06)[0]}, the optimum is {FT06_OPTIMUM}")


if __name__ == "__main__":
    main()
