"""Policies that learn nothing, to compare others with. Imports nothing heavy."""

from typing import Any

import gymnasium as gym
import numpy as np

#: Names of the policies, and the kind of evaluation that each has a score of
REFERENCES = {"random": "stochastic", "zero_action": "deterministic"}

#: Seeds of evaluation are this far from those of training
EVAL_SEED_OFFSET = 1_000_000


def evaluate_reference(
    name: str, env_id: str, seed: int, n_episodes: int, env_kwargs: dict[str, Any] | None = None
) -> list[float]:
    """
    Evaluate a policy that learns nothing.

    :param name: ``"random"``, uniformly random actions, or ``"zero_action"``, the action of zeros
    :param env_id: Id of an environment
    :param seed: Seed of the run that the reference stands beside
    :param n_episodes: Number of episodes
    :param env_kwargs: Arguments of the environment
    :return: Return of each episode
    """
    env = gym.make(env_id, **(env_kwargs or {}))
    space: Any = env.action_space
    space.seed(EVAL_SEED_OFFSET + seed)
    zero = np.zeros(space.shape, space.dtype)
    returns = []
    for episode in range(n_episodes):
        env.reset(seed=EVAL_SEED_OFFSET + seed if episode == 0 else None)
        total, done = 0.0, False
        while not done:
            _, reward, terminated, truncated, _ = env.step(space.sample() if name == "random" else zero)
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    env.close()
    return returns
