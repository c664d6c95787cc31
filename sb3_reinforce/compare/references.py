"""Policies that learn nothing, to compare others with. Imports nothing heavy."""

from typing import Any

import gymnasium as gym
import numpy as np

#: Names of the policies, and the kind of evaluation that each has a score of
REFERENCES = {"random": "stochastic", "zero_action": "deterministic"}

#: Seeds of evaluation are this far from those of training
EVAL_SEED_OFFSET = 1_000_000


def find_mask(env: gym.Env, observation: Any, info: dict[str, Any]) -> np.ndarray | None:
    """
    Read the action mask that an environment offers, in one of the ways of :mod:`sb3_reinforce.masks`.

    :param env: Environment
    :param observation: Its last observation
    :param info: Its last info
    :return: Whether each action is valid, shape ``(mask_size,)``, ``None`` if the environment offers no mask
    """
    if isinstance(env.observation_space, gym.spaces.Dict) and "action_mask" in env.observation_space.spaces:
        return np.asarray(observation["action_mask"], dtype=bool)
    if env.has_wrapper_attr("action_masks"):
        return np.asarray(env.get_wrapper_attr("action_masks")(), dtype=bool)
    return np.asarray(info["action_mask"], dtype=bool) if "action_mask" in info else None


def masked_action(valid: np.ndarray, space: Any, is_random: bool) -> Any:
    """
    Choose a valid action.

    :param valid: Whether each action is valid, shape ``(mask_size,)``
    :param space: Action space
    :param is_random: Whether to take any of them, drawn by the generator of the space, or else the first one
    :return: The action
    """
    is_several = isinstance(space, gym.spaces.MultiDiscrete)
    ends = np.cumsum(space.nvec)[:-1] if is_several else range(2, len(valid), 2)
    parts = [valid] if isinstance(space, gym.spaces.Discrete) else np.split(valid, ends)
    chosen = [space.np_random.choice(np.flatnonzero(part)) if is_random else part.argmax() for part in parts]
    return np.array(chosen, dtype=space.dtype).reshape(space.shape)


def evaluate_reference(
    name: str, env_id: str, seed: int, n_episodes: int, env_kwargs: dict[str, Any] | None = None
) -> list[float]:
    """
    Evaluate a policy that learns nothing.

    :param name: ``"random"``, uniformly random actions, or ``"zero_action"``, the action of zeros. With the action masks of
        the environment: uniformly random valid actions, or the first valid one
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
        observation, info = env.reset(seed=EVAL_SEED_OFFSET + seed if episode == 0 else None)
        total, done = 0.0, False
        while not done:
            valid = find_mask(env, observation, info)
            if valid is not None:
                action = masked_action(valid, space, name == "random")
            else:
                action = space.sample() if name == "random" else zero
            observation, reward, terminated, truncated, info = env.step(action)
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    env.close()
    return returns
