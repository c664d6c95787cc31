"""Environments for the tests of comparisons, which processes that are started by them import."""

import os
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
from gymnasium import spaces

from sb3_reinforce.checks import versions
from sb3_reinforce.compare.files import EPISODES, FAILURE, JOB, KINDS, RESULT, write_json

#: While this folder holds a file "raise" or "slow", environments do so
SWITCHES = Path(os.environ.get("COMPARE_ENVS", "/nowhere"))


class SwitchedEnv(gym.Env):
    """
    Ten steps, each rewarded with one less the size of the action.

    :param switch: "raise": raises in its 50th step, "slow": sleeps in every step
    :param scale: Factor of the rewards
    """

    observation_space = spaces.Box(0, 10, (1,))
    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, switch=None, scale=1.0):
        self.switch = switch
        self.scale = scale
        self.n_steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.time += 1
        self.n_steps += 1
        if self.switch == "raise" and self.n_steps == 50 and (SWITCHES / "raise").is_file():
            raise RuntimeError("the motor is broken")
        if self.switch == "slow" and (SWITCHES / "slow").is_file():
            time.sleep(0.02)
        reward = self.scale * (1 - float(np.abs(action).sum()))
        return np.full(1, self.time, np.float32), reward, self.time == 10, False, {}


gym.register("Game-v0", "ale_py:AtariEnv")
gym.register("Plain-v0", SwitchedEnv, reward_threshold=5)
gym.register("Raising-v0", SwitchedEnv, kwargs={"switch": "raise"}, reward_threshold=5)
gym.register("Slow-v0", SwitchedEnv, kwargs={"switch": "slow"}, reward_threshold=5)


def fake_run(folder, job):
    """Takes the place of a run: leaves files as a run does, in no time, with numbers that depend on the run alone."""
    folder.mkdir(parents=True)
    write_json(folder / JOB, job)
    if job["env"] == "Raising-v0" and (SWITCHES / "raise").is_file():
        write_json(folder / FAILURE, {"error": "RuntimeError('the motor is broken')"})
        return
    rng = np.random.default_rng([job["seed"], *f"{job['contender']} {job['env']}".encode()])
    result = {kind: list(rng.normal(size=job["n_eval_episodes"])) for kind in KINDS}
    if job["algo"] is None:
        result.pop("deterministic" if job["contender"] == "random" else "stochastic")
    else:
        lengths = rng.integers(1, 20, size=60)
        result |= {"num_timesteps": int(lengths.sum()) + 7, "seconds": 60 + rng.random()}
        columns = {"num_timesteps": lengths.cumsum(), "seconds": np.arange(1, 61), "return": rng.normal(4, size=60)}
        pd.DataFrame({**columns, "length": lengths}).to_csv(folder / EPISODES, index=False)
    write_json(folder / RESULT, {**result, "versions": versions()})
