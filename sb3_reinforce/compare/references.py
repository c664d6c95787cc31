"""Policies that learn nothing, to compare others with."""

from typing import Any

import gymnasium as gym
import numpy as np
from rl_zoo3.utils import get_wrapper_class
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_reinforce.masks import MaskedModel, MaskLayout

#: Names of the policies, and the kind of evaluation that each has a score of
REFERENCES = {"random": "stochastic", "zero_action": "deterministic"}

#: Environments of the evaluation of a policy that has learned
N_EVAL_ENVS = 10


def eval_seed(seed: int) -> int:
    """
    Find the seed of the first environment of an evaluation; the others have those that follow. Runs of other seeds share none
    with it, so that their scores are independent.

    :param seed: Seed of a run
    :return: The seed, far from those of training
    """
    return (1_000_000 + N_EVAL_ENVS * seed) % 2**31


def make_env(env_id: str, settings: dict[str, Any]) -> DummyVecEnv:
    """
    Make an environment as those that learn have it, without normalization.

    :param env_id: Id of an environment
    :param settings: Its hyperparameters, of which :data:`~sb3_reinforce.compare.files.OF_ENVIRONMENT` count
    :return: A vectorized environment that holds it
    """
    wrap = get_wrapper_class({"env_wrapper": settings.get("env_wrapper")}) or (lambda env: env)
    return DummyVecEnv([lambda: wrap(Monitor(gym.make(env_id, **(settings.get("env_kwargs") or {}))))])


class ReferenceModel:
    """
    A model that has learned nothing, for the evaluation of one environment.

    :param name: ``"random"``, uniformly random actions, or ``"zero_action"``, the action of zeros. With action masks:
        uniformly random valid actions, or the first valid one
    :param action_space: Space of the actions, whose generator draws them
    """

    def __init__(self, name: str, action_space: Any):
        self.is_random, self.action_space = name == "random", action_space

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Any]:
        """
        Choose an action, as models predict one.

        :param observation: Not looked at
        :param state: Handed back
        :param episode_start: Not looked at
        :param deterministic: Not looked at: each of the policies has one way to act
        :param action_masks: Whether each action is valid, shape ``(1, mask_size)``, or ``None``
        :return: Actions of shape ``(1, *action_space.shape)``, and ``state``
        """
        space = self.action_space
        if action_masks is not None:
            valid = np.split(action_masks[0], MaskLayout(space).starts[1:])
            action: Any = [space.np_random.choice(np.flatnonzero(p)) if self.is_random else p.argmax() for p in valid]
        else:
            action = space.sample() if self.is_random else np.zeros(space.shape)
        return np.array(action, dtype=space.dtype).reshape(1, *space.shape), state


def evaluate_reference(name: str, env_id: str, seed: int, n_episodes: int, settings: dict[str, Any]) -> list[float]:
    """
    Evaluate a policy that learns nothing.

    :param name: One of :data:`REFERENCES`
    :param env_id: Id of an environment
    :param seed: Seed of the run that the reference stands beside
    :param n_episodes: Number of episodes
    :param settings: As for :func:`make_env`
    :return: Return of each episode
    """
    env = make_env(env_id, settings)
    env.seed(eval_seed(seed))
    env.action_space.seed(eval_seed(seed))
    model: Any = MaskedModel(ReferenceModel(name, env.action_space), env)
    returns, _ = evaluate_policy(model, env, n_episodes, return_episode_rewards=True)
    env.close()
    return list(returns)  # type: ignore[arg-type]
