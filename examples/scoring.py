"""
What the examples of random problems share: a policy that scores the items of a problem, with an actor whose size does not
depend on their number; how it is trained and evaluated.
"""

import time
from collections.abc import Callable
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_reinforce import REINFORCE
from sb3_reinforce.policies import ReinforcePolicy

#: Seeds of the problems that are learned from are drawn at random; those of the held-out problems are these
HELD_OUT = range(10**9, 10**9 + 100)


class ItemScores(BaseFeaturesExtractor):
    """
    Score the items of an observation of shape ``(n_items, n_numbers)``: each item on its own, with one network for all of
    them, then each beside the mean of all (Deep Sets, Zaheer et al., https://arxiv.org/abs/1703.06114).

    :param observation_space: Observation space
    :param n_units: Number of units of the layers
    """

    def __init__(self, observation_space: spaces.Box, n_units: int = 64):
        n_items, n_numbers = observation_space.shape
        super().__init__(observation_space, n_items + n_units)
        self.items = nn.Sequential(nn.Linear(n_numbers, n_units), nn.Tanh(), nn.Linear(n_units, n_units), nn.Tanh())
        self.scores = nn.Sequential(nn.Linear(2 * n_units, n_units), nn.Tanh(), nn.Linear(n_units, 1))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        Compute the features.

        :param observations: Observations, shape ``(n_steps, n_items, n_numbers)``
        :return: The score of each item, and the mean that a critic can go by, shape ``(n_steps, n_items + n_units)``
        """
        items = self.items(observations)
        mean = items.mean(dim=1)
        scores = self.scores(th.cat([items, mean[:, None].expand_as(items)], dim=2))
        return th.cat([scores.squeeze(2), mean], dim=1)


class FirstColumns(nn.Module):
    """
    Take the scores of the features for logits.

    :param n_items: Number of items
    """

    def __init__(self, n_items: int):
        super().__init__()
        self.n_items = n_items

    def forward(self, features: th.Tensor) -> th.Tensor:
        """
        Take the scores.

        :param features: Result of :class:`ItemScores`
        :return: Logits, shape ``(n_steps, n_items)``
        """
        return features[:, : self.n_items]


def scoring(policy_class: type) -> type:
    """
    Let a policy choose among items by their scores.

    :param policy_class: A policy of SB3, sb3_contrib or sb3_reinforce for ``Discrete`` actions
    :return: The policy that does
    """

    class ScoringPolicy(policy_class):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(
                *args,
                **{"features_extractor_class": ItemScores, "net_arch": {"pi": [], "vf": []}, "ortho_init": False, **kwargs},
            )

        def _build(self, lr_schedule: Any) -> None:
            super()._build(lr_schedule)
            self.action_net = FirstColumns(int(self.action_space.n))

    return ScoringPolicy


def make_model(env_class: Callable[..., Any], env_kwargs: dict[str, Any], seed: int, **kwargs: Any) -> REINFORCE:
    """
    Make the model of an example.

    :param env_class: Its environment
    :param env_kwargs: Arguments of the environment
    :param seed: Seed
    :param kwargs: Other arguments of ``REINFORCE``
    :return: The model
    """
    env = make_vec_env(env_class, 32, seed=seed, env_kwargs=env_kwargs)
    settings: dict[str, Any] = dict(n_episodes=64, group_size=8, baseline="timestep", gamma=1.0, cg_max_steps=8)
    return REINFORCE(scoring(ReinforcePolicy), env, seed=seed, device="cpu", **{**settings, **kwargs})


def of_model(model: Any) -> Any:
    """
    Let a model choose, by its likeliest actions.

    :param model: A model
    :return: Function that takes the environment and its observation, and gives the action
    """
    return lambda env, observation: int(model.predict(observation, action_masks=env.action_masks(), deterministic=True)[0])


class Deadline(BaseCallback):
    """
    Stop after some time.

    :param seconds: Seconds of training, beginning now
    :param clock: What measures them
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self.seconds, self.clock, self.end = seconds, clock, clock() + seconds

    def falling(self, start: float) -> Callable[[float], float]:
        """
        Make a schedule that falls to a tenth by the clock, for a run whose number of steps is not known.

        :param start: Value at the start
        :return: Function for an argument such as ``target_kl``
        """
        return lambda _: start * max(0.1, (self.end - self.clock()) / self.seconds)

    def _on_step(self) -> bool:
        return self.clock() < self.end
