"""A batch of whole episodes: its steps, its episodes, its parts."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.type_aliases import TensorDict

if TYPE_CHECKING:
    from sb3_reinforce.buffers import EpisodeRolloutBuffer


class EpisodeRolloutBufferSamples(NamedTuple):
    """
    Some steps of a batch, shape ``(n_steps, ...)``.

    :param observations: Observations, or a dict of them
    :param actions: Actions as the policy sampled them (before clipping), in the form that distributions take
    :param advantages: Factors of the gradients of the log-probabilities
    :param targets: Targets of the critic
    :param halves: 1 for the steps of one half of the episodes, 0 for those of the other
    :param episode_starts: Whether a step is the first of its episode. A policy with memory gets whole episodes, end to end
    :param action_masks: Whether each action was valid, in the layout of sb3_contrib (:mod:`sb3_reinforce.masks`), ``None``
        where all were
    """

    observations: th.Tensor | TensorDict
    actions: th.Tensor | None = None
    advantages: th.Tensor | None = None
    targets: th.Tensor | None = None
    halves: th.Tensor | None = None
    episode_starts: th.Tensor | None = None
    action_masks: th.Tensor | None = None


class Episode:
    """
    An episode of the batch. Its steps can be read from the end of the rollout to the start of the next one.

    :param env_idx: Index of its environment
    :param truncated: Whether a time limit cut it off
    :param terminal_observation: Observation after its last step, ``None`` if the environment does not give it
    :param group: Number of the group of episodes that it shares its start with, 0 where starts are not shared
    :param is_greedy: Whether its actions were the likeliest ones, so that it is no part of the batch
    :param record: What ``Monitor`` says about it, the ``infos["episode"]`` of its last step; SB3 logs the means of ``r`` and
        ``l``
    """

    def __init__(
        self,
        env_idx: int,
        truncated: bool = False,
        terminal_observation: np.ndarray | dict[str, np.ndarray] | None = None,
        group: int = 0,
        is_greedy: bool = False,
        record: dict[str, Any] | None = None,
    ):
        self.env_idx = env_idx
        self.truncated = truncated
        self.terminal_observation = terminal_observation
        self.group = group
        self.is_greedy = is_greedy
        self.record = record
        # Set when the rollout is over
        self._buffer: EpisodeRolloutBuffer | None = None
        self._steps = slice(0)

    def _bind(self, buffer: "EpisodeRolloutBuffer", steps: slice) -> None:
        self._buffer, self._steps = buffer, steps

    def _rows(self) -> tuple["EpisodeRolloutBuffer", np.ndarray]:
        if self._buffer is None:
            raise RuntimeError(
                "The steps of an episode are known from the end of its rollout to the start of the next one: copy them"
            )
        rows = self._buffer.greedy_rows if self.is_greedy else self._buffer.rows
        return self._buffer, rows[self._steps]

    def __len__(self) -> int:
        return len(self._rows()[1])

    @property
    def observations(self) -> np.ndarray | dict[str, np.ndarray]:
        """Observations that were acted on, shape ``(n_steps, *obs_shape)``, or a dict of them."""
        buffer, rows = self._rows()
        return buffer.observations_of(rows)

    @property
    def actions(self) -> np.ndarray:
        """Actions as the policy sampled them (before clipping), shape ``(n_steps, action_dim)``."""
        buffer, rows = self._rows()
        return buffer.column("action", rows)

    @property
    def rewards(self) -> np.ndarray:
        """Rewards, shape ``(n_steps,)``: part of those of the batch, which a callback may change before the update."""
        buffer, _ = self._rows()
        return (buffer.greedy_rewards if self.is_greedy else buffer.rewards)[self._steps]

    @rewards.setter
    def rewards(self, rewards: np.ndarray | float) -> None:
        self.rewards[:] = rewards

    @property
    def infos(self) -> list[dict[str, Any]]:
        """Infos of each step: the ``info_keywords`` of the buffer."""
        buffer, rows = self._rows()
        return buffer.infos_of(rows)


class Chunks:
    """
    The batch in parts, so that memory does not grow with the batch. It can be iterated over again and again.

    :param buffer: Finished buffer
    :param parts: The steps of each part
    """

    def __init__(self, buffer: "EpisodeRolloutBuffer", parts: list[slice]):
        self._buffer, self._parts = buffer, parts

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[EpisodeRolloutBufferSamples]:
        return map(self._buffer._get_samples, self._parts)


def flat_observations(batches: Iterable[EpisodeRolloutBufferSamples], observation_space: spaces.Space) -> np.ndarray:
    """
    Lay the numbers of each observation end to end, as networks get them (discrete ones one-hot).

    :param batches: Parts of a batch
    :param observation_space: Observation space
    :return: Observations, shape ``(n_steps, n_numbers)``
    """
    rows = [np.zeros((0, spaces.flatdim(observation_space)))]
    for batch in batches:
        observations = preprocess_obs(batch.observations, observation_space)
        parts = observations.values() if isinstance(observations, dict) else [observations]
        rows.append(np.hstack([part.flatten(start_dim=1).cpu().numpy() for part in parts]))
    return np.concatenate(rows)
