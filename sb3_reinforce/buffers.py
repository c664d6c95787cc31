from collections.abc import Hashable, Iterator
from typing import NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.type_aliases import TensorDict
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs
from stable_baselines3.common.vec_env.util import dict_to_obs, obs_space_info

from sb3_reinforce.distributed import by_rank, on_first, rank


class EpisodeRolloutBufferSamples(NamedTuple):
    """
    :param observations: Observations, shape ``(n_steps, *obs_shape)``, or a dict of them
    :param actions: Actions as the policy sampled them (before clipping), shape ``(n_steps, action_dim)``
    :param advantages: What multiplies the gradient of the log-probability, shape ``(n_steps,)``
    :param returns: Targets of the critic, shape ``(n_steps,)``
    """

    observations: th.Tensor | TensorDict
    actions: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor


class Episode(NamedTuple):
    """
    How an episode of the batch ended.

    :param env_idx: Index of its environment
    :param truncated: Whether a time limit cut it off
    :param terminal_observation: What the environment showed after its last step, if the critic is to judge it
    """

    env_idx: int
    truncated: bool
    terminal_observation: np.ndarray | dict[str, np.ndarray] | None


class EpisodeRolloutBuffer(BaseBuffer):
    """
    Rollout buffer of whole episodes, for array and dict observations.

    Steps are stored in the order in which they arrive, in arrays that double when they are full and that are kept from
    one rollout to the next: memory is proportional to the steps of the largest batch. :meth:`finish` tells the episodes
    apart. From there on ``rewards``, ``advantages`` and ``returns``, of shape ``(n_steps,)``, hold the episodes end to
    end, and ``lengths`` and ``episodes``, of length ``n_episodes``, describe them in the same order. ``total_episodes`` and
    ``total_steps`` count those of all processes (:mod:`sb3_reinforce.distributed`).

    :param buffer_size: Number of steps to make room for at first
    :param observation_space: Observation space
    :param action_space: Action space
    :param device: PyTorch device
    :param gae_lambda: Not used, SB3 passes it: the formulas are in :mod:`sb3_reinforce.returns`
    :param gamma: Not used, likewise
    :param n_envs: Number of parallel environments
    """

    rewards: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray
    lengths: np.ndarray
    episodes: list[Episode]
    total_episodes: int
    total_steps: int

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        gae_lambda: float = 1,
        gamma: float = 0.99,
        n_envs: int = 1,
    ):
        super().__init__(buffer_size, observation_space, action_space, device, n_envs=n_envs)
        # As in SB3's vectorized environments: one array per key, and the key is None if the space is not a dict
        self._obs_keys, obs_shapes, obs_dtypes = obs_space_info(observation_space)
        # What is sampled for a Box is in single precision, whatever the precision of the space
        action_dtype = np.float32 if isinstance(action_space, spaces.Box) else action_space.dtype
        # All are columns of one table, so that they grow together
        self._columns: dict[Hashable, np.ndarray] = {
            "action": np.empty((buffer_size, self.action_dim), action_dtype),
            "reward": np.empty(buffer_size, np.float32),
            "done": np.empty(buffer_size, bool),
            "env_idx": np.empty(buffer_size, np.int32),
        }
        for key in self._obs_keys:
            # Networks compute in single precision; images stay bytes
            dtype = np.float32 if obs_dtypes[key] == np.float64 else obs_dtypes[key]
            self._columns["obs", key] = np.empty((buffer_size, *obs_shapes[key]), dtype)
        self.reset()

    def reset(self) -> None:
        """Forget the steps, keep the memory."""
        super().reset()
        self.episodes = []
        self._order: np.ndarray | None = None

    def add(self, obs: VecEnvObs, action: np.ndarray, reward: np.ndarray, done: np.ndarray, env_indices: np.ndarray) -> None:
        """
        Store one step of some of the environments.

        :param obs: Observations that were acted on, shape ``(n_envs, *obs_shape)``, or a dict of them
        :param action: Actions as the policy sampled them, shape ``(n_envs, *action_shape)``
        :param reward: Rewards, shape ``(n_envs,)``
        :param done: Whether the step ended the episode, shape ``(n_envs,)``
        :param env_indices: The environments whose step is stored, in ascending order, shape ``(n_stored,)``
        """
        start, self.pos = self.pos, self.pos + len(env_indices)
        if self.pos > self.buffer_size:
            self._grow()
        columns, rows = self._columns, slice(start, self.pos)
        columns["env_idx"][rows] = env_indices
        if len(env_indices) < len(reward):
            obs = {key: array[env_indices] for key, array in obs.items()} if isinstance(obs, dict) else obs[env_indices]
            action, reward, done = action[env_indices], reward[env_indices], done[env_indices]
        for key in self._obs_keys:
            columns["obs", key][rows] = obs if key is None else obs[key]  # type: ignore[call-overload]
        columns["action"][rows] = action.reshape(len(reward), -1)
        columns["reward"][rows] = reward
        columns["done"][rows] = done

    def _grow(self) -> None:
        self.buffer_size = max(2 * self.buffer_size, self.pos)
        for key, column in self._columns.items():
            # Memory that is not written to yet is not taken from the system either
            self._columns[key] = np.empty((self.buffer_size, *column.shape[1:]), column.dtype)
            self._columns[key][: len(column)] = column

    def end_episode(self, episode: Episode) -> None:
        """
        Say how the episode ended whose last step was stored just now.

        :param episode: Its environment, and how it ended
        """
        self.episodes.append(episode)

    def finish(self, discard_truncated: bool = False) -> None:
        """
        Put the episodes end to end: those of the first environment in the order of time, those of the second, ... All
        processes have to call it.

        :param discard_truncated: Leave out the episodes that a time limit cut off
        """
        self._order = np.argsort(self._columns["env_idx"][: self.pos], kind="stable")
        self.episodes.sort(key=lambda episode: episode.env_idx)
        ends = np.flatnonzero(self._columns["done"][self._order]) + 1
        assert len(ends) == len(self.episodes) and (len(ends) == 0 or ends[-1] == self.pos), "An episode is not complete"
        self.lengths = np.diff(ends, prepend=0)
        if discard_truncated:
            kept = np.array([not episode.truncated for episode in self.episodes], dtype=bool)
            self._order = self._order[np.repeat(kept, self.lengths)]
            self.lengths = self.lengths[kept]
            self.episodes = [episode for episode in self.episodes if not episode.truncated]
        counts = by_rank([self.n_episodes, self.n_steps]).astype(int)
        self.total_episodes, self.total_steps = counts.sum(axis=0)
        self._first_step = counts[: rank(), 1].sum()
        self.rewards = self._columns["reward"][self._order]
        self.advantages = np.zeros_like(self.rewards)
        self.returns = np.zeros_like(self.rewards)

    @property
    def n_episodes(self) -> int:
        """Number of episodes in the batch."""
        return len(self.episodes)

    @property
    def n_steps(self) -> int:
        """Number of steps in the batch."""
        return self.pos if self._order is None else len(self._order)

    def get(self, batch_size: int | None = None) -> Iterator[EpisodeRolloutBufferSamples]:
        """
        Iterate over the finished batch, episode by episode. Nothing is rearranged: it can be iterated over again.

        :param batch_size: Number of steps per sample, ``None`` for all at once
        :return: Samples
        """
        assert self._order is not None, "finish() comes first"
        batch_size = batch_size or max(self.n_steps, 1)
        for start in range(0, self.n_steps, batch_size):
            yield self._get_samples(slice(start, start + batch_size))

    def get_minibatches(self, batch_size: int) -> Iterator[tuple[EpisodeRolloutBufferSamples, int]]:
        """
        Iterate over the steps of all processes in a random order, the same in every process.

        :param batch_size: Number of steps per minibatch
        :return: What this process has of each minibatch, and the number of steps in it
        """
        seed = on_first(lambda: np.random.randint(2**31))
        permutation = np.random.default_rng(seed).permutation(self.total_steps) - self._first_step
        for start in range(0, self.total_steps, batch_size):
            minibatch = permutation[start : start + batch_size]
            yield self._get_samples(minibatch[(0 <= minibatch) & (minibatch < self.n_steps)]), len(minibatch)

    def _get_samples(self, batch_inds: np.ndarray | slice) -> EpisodeRolloutBufferSamples:  # type: ignore[override]
        assert self._order is not None
        rows = self._order[batch_inds]
        observations = {key: self.to_torch(self._columns["obs", key][rows], copy=False) for key in self._obs_keys}
        return EpisodeRolloutBufferSamples(
            observations=dict_to_obs(self.observation_space, observations),  # type: ignore[arg-type]
            actions=self.to_torch(self._columns["action"][rows], copy=False),
            advantages=self.to_torch(self.advantages[batch_inds], copy=False),
            returns=self.to_torch(self.returns[batch_inds], copy=False),
        )
