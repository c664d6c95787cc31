from collections.abc import Hashable, Iterator, Sequence
from itertools import compress
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs
from stable_baselines3.common.vec_env.util import dict_to_obs, obs_space_info

from sb3_reinforce.batch import Chunks, Episode, EpisodeRolloutBufferSamples
from sb3_reinforce.parallel.processes import all_sum, by_rank, on_first, rank
from sb3_reinforce.returns import episode_starts


class EpisodeRolloutBuffer(BaseBuffer):
    """
    Rollout buffer of whole episodes, for array and dict observations.

    Steps are stored in the order in which they arrive, in arrays that double when they are full and that are kept from
    one rollout to the next: memory is proportional to the steps of the largest batch. :meth:`finish` tells the episodes
    apart. From there on ``observations``, ``actions``, ``rewards``, ``episode_starts`` and, after the update,
    ``advantages``, ``returns`` (of the estimator) and ``targets`` (of the critic), of shape ``(n_steps, ...)``, hold the
    episodes end to end. ``lengths`` and ``episodes``, of length ``n_episodes``, describe them in the same order.
    ``groups``, of the same length, holds the number of the group of each. ``total_episodes``, ``total_steps`` and
    ``n_groups`` are those of all processes (:mod:`sb3_reinforce.parallel`).

    Greedy episodes are no part of the batch: ``greedy_episodes``, ``greedy_lengths``, ``greedy_groups`` and ``greedy_rewards``
    hold them.

    A callback sees the episodes one by one at the end of a rollout: ``for episode in rollout_buffer.episodes:
    episode.observations, episode.actions, episode.rewards, episode.terminal_observation, episode.infos``.

    :param buffer_size: Number of steps to make room for at first
    :param observation_space: Observation space
    :param action_space: Action space
    :param device: PyTorch device
    :param gae_lambda: Not used, SB3 passes it: the formulas are in :mod:`sb3_reinforce.returns`
    :param gamma: Not used, likewise
    :param n_envs: Number of parallel environments
    :param info_keywords: Keys of the infos to keep for each step
    """

    #: Indices of no steps
    _NO_STEPS = np.zeros(0, dtype=int)

    advantages: np.ndarray
    returns: np.ndarray
    targets: np.ndarray
    rewards: np.ndarray
    episode_starts: np.ndarray
    lengths: np.ndarray
    groups: np.ndarray
    episodes: list[Episode]
    greedy_rewards: np.ndarray
    greedy_rows: np.ndarray
    greedy_lengths: np.ndarray
    greedy_groups: np.ndarray
    greedy_episodes: list[Episode]
    total_episodes: int
    total_steps: int
    n_groups: int

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        gae_lambda: float = 1,
        gamma: float = 0.99,
        n_envs: int = 1,
        info_keywords: Sequence[str] = (),
    ):
        super().__init__(buffer_size, observation_space, action_space, device, n_envs=n_envs)
        self.info_keywords = tuple(info_keywords)
        # As in SB3's vectorized environments: one array per key, and the key is None if the space is not a dict
        self._obs_keys, obs_shapes, obs_dtypes = obs_space_info(observation_space)
        of_dict = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {}
        parts: dict[Any, spaces.Space] = {None: observation_space, **of_dict}
        # Samples of a Box are in single precision, whatever the precision of the space
        action_dtype = np.float32 if isinstance(action_space, spaces.Box) else action_space.dtype
        # All are columns of one table, so that they grow together
        self._columns: dict[Hashable, np.ndarray] = {
            "action": np.empty((buffer_size, self.action_dim), action_dtype),
            "reward": np.empty(buffer_size, np.float32),
            "done": np.empty(buffer_size, bool),
            "env_idx": np.empty(buffer_size, np.int32),
        }
        for key in self._obs_keys:
            # Networks compute in single precision, and VecNormalize makes fractions of whole numbers; images stay bytes
            is_number = isinstance(parts[key], spaces.Box) and not is_image_space(parts[key])
            dtype = np.float32 if is_number else obs_dtypes[key]
            self._columns["obs", key] = np.empty((buffer_size, *obs_shapes[key]), dtype)
        self.reset()

    def reset(self) -> None:
        """Forget the steps, keep the memory."""
        super().reset()
        # Whoever has kept an episode is not to get the steps of another
        for episode in [*getattr(self, "episodes", ()), *getattr(self, "greedy_episodes", ())]:
            episode._buffer = None
        self.episodes, self.greedy_episodes = [], []
        self._infos: list[dict[str, Any]] = []
        self._last_step = slice(0)
        self._order: np.ndarray | None = None

    def add(self, obs: VecEnvObs, action: np.ndarray, env_indices: np.ndarray, action_masks: np.ndarray | None = None) -> None:
        """
        Store how some of the environments go on. The outcome follows after the step (:meth:`add_outcome`): a vectorized
        environment may reuse the array of the observations for the next ones.

        :param obs: Observations that are acted on, shape ``(n_envs, *obs_shape)``, or a dict of them
        :param action: Actions as the policy sampled them, shape ``(n_envs, *action_shape)``
        :param env_indices: The environments whose step is stored, in ascending order, shape ``(n_stored,)``
        :param action_masks: Whether each action was valid, shape ``(n_envs, mask_size)``; either with each step or with none
        """
        n_stored = len(env_indices)
        start, self.pos = self.pos, self.pos + n_stored
        if start == 0:
            self._use_column("action_mask", action_masks)
        if self.pos > self.buffer_size:
            self._grow()
        columns, rows = self._columns, slice(start, self.pos)
        self._last_step, self._stored = rows, env_indices
        columns["env_idx"][rows] = env_indices
        if n_stored < len(action):
            obs = {key: array[env_indices] for key, array in obs.items()} if isinstance(obs, dict) else obs[env_indices]
            action = action[env_indices]
            action_masks = None if action_masks is None else action_masks[env_indices]
        for key in self._obs_keys:
            columns["obs", key][rows] = obs if key is None else obs[key]  # type: ignore[call-overload]
        if action_masks is not None:
            columns["action_mask"][rows] = action_masks
        columns["action"][rows] = action.reshape(n_stored, -1)

    def add_outcome(self, reward: np.ndarray, done: np.ndarray, infos: list[dict[str, Any]]) -> None:
        """
        Store the outcome of the step whose observations and actions were stored last.

        :param reward: Rewards, shape ``(n_envs,)``
        :param done: Whether the step ended the episode, shape ``(n_envs,)``
        :param infos: Infos, of length ``n_envs``
        """
        if len(self._stored) < len(reward):
            reward, done = reward[self._stored], done[self._stored]
        columns, rows = self._columns, self._last_step
        columns["reward"][rows] = reward
        columns["done"][rows] = done
        if self.info_keywords:
            self._infos += [{key: infos[i][key] for key in self.info_keywords if key in infos[i]} for i in self._stored]

    def _use_column(self, key: Hashable, values: np.ndarray | None) -> None:
        """
        Make a column that some rollouts have and others have not, or forget it.

        :param key: Name of the column
        :param values: Values of a step, shape ``(n_envs, *shape)``, ``None`` if the rollout has no such column
        """
        if values is None:
            self._columns.pop(key, None)
        elif key not in self._columns:
            self._columns[key] = np.empty((self.buffer_size, *values.shape[1:]), values.dtype)

    def _grow(self) -> None:
        self.buffer_size = max(2 * self.buffer_size, self.pos)
        for key, column in self._columns.items():
            # Memory that is not written to yet is not taken from the system either
            self._columns[key] = np.empty((self.buffer_size, *column.shape[1:]), column.dtype)
            self._columns[key][: len(column)] = column

    def end_episode(self, episode: Episode) -> None:
        """
        Say how the episode ended whose last step was stored just now.

        :param episode: The episode
        """
        self.episodes.append(episode)

    def finish(self, discard_truncated: bool = False) -> None:
        """
        Put the episodes end to end: those of the first environment in the order of time, those of the second, ... All
        processes have to call this.

        :param discard_truncated: Leave out the episodes that a time limit cut off
        """
        order = np.argsort(self._columns["env_idx"][: self.pos], kind="stable")
        episodes = sorted(self.episodes, key=lambda episode: episode.env_idx)
        ends = np.flatnonzero(self._columns["done"][order]) + 1
        assert len(ends) == len(episodes) and (len(ends) == 0 or ends[-1] == self.pos), "An episode is not complete"
        lengths = np.diff(ends, prepend=0)

        def select(kept: list[bool]) -> tuple[list[Episode], np.ndarray, np.ndarray, np.ndarray]:
            are_kept = np.array(kept, dtype=bool)
            chosen, chosen_lengths = list(compress(episodes, kept)), lengths[are_kept]
            for episode, end, length in zip(chosen, np.cumsum(chosen_lengths), chosen_lengths, strict=True):
                episode._bind(self, slice(end - length, end))
            groups = np.array([episode.group for episode in chosen], dtype=int)
            return chosen, order[np.repeat(are_kept, lengths)], chosen_lengths, groups

        are_greedy = [episode.is_greedy for episode in episodes]
        self.greedy_episodes, self.greedy_rows, self.greedy_lengths, self.greedy_groups = select(are_greedy)
        self.greedy_rewards = self.column("reward", self.greedy_rows)
        are_batch = [not (episode.is_greedy or (discard_truncated and episode.truncated)) for episode in episodes]
        self.episodes, self._order, self.lengths, self.groups = select(are_batch)
        counts = by_rank([self.n_episodes, self.n_steps, self.groups.max(initial=0) + 1]).astype(int)
        self.total_episodes, self.total_steps, _ = counts.sum(axis=0)
        self.n_groups = counts[:, 2].max()
        # Every other episode, counted over all processes, or every other group: its episodes depend on each other
        self._first_episode, self._first_step, *_ = counts[: rank()].sum(axis=0)
        numbers = self.groups if self.n_groups > 1 else self._first_episode + np.arange(self.n_episodes)
        is_first_half = numbers % 2 == 0
        self.episode_starts = np.zeros(self.n_steps, dtype=bool)
        self.episode_starts[episode_starts(self.lengths)] = True
        self._halves = np.repeat(is_first_half.astype(np.float32), self.lengths)
        self.rewards = self.column("reward", self._order)
        # Unknown until the update, which a callback that changes the rewards comes before
        self.advantages, self.returns, self.targets = (np.full_like(self.rewards, np.nan) for _ in range(3))

    @property
    def rows(self) -> np.ndarray:
        """Where the steps of the batch are stored, episode by episode (before :meth:`finish`: as they arrived)."""
        return np.arange(self.pos) if self._order is None else self._order

    def column(self, key: Hashable, rows: np.ndarray) -> np.ndarray:
        """
        Take some rows of a column.

        :param key: Name of the column
        :param rows: Rows, see :attr:`rows`
        :return: Their values, a copy
        """
        return self._columns[key][rows]

    def observations_of(self, rows: np.ndarray) -> np.ndarray | dict[str, np.ndarray]:
        """
        Take the observations of some rows.

        :param rows: Rows, see :attr:`rows`
        :return: Observations, or a dict of them
        """
        arrays = {key: self.column(("obs", key), rows) for key in self._obs_keys}
        return dict_to_obs(self.observation_space, arrays)  # type: ignore[return-value]

    def infos_of(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """
        Take the infos of some rows.

        :param rows: Rows, see :attr:`rows`
        :return: The ``info_keywords`` of each
        """
        return [self._infos[row] for row in rows] if self._infos else [{} for _ in rows]

    @property
    def observations(self) -> np.ndarray | dict[str, np.ndarray]:
        """Observations of the batch, shape ``(n_steps, *obs_shape)``, or a dict of them."""
        return self.observations_of(self.rows)

    @property
    def actions(self) -> np.ndarray:
        """Actions of the batch as the policy sampled them, shape ``(n_steps, action_dim)``."""
        return self.column("action", self.rows)

    @property
    def action_masks(self) -> np.ndarray | None:
        """Whether each action of the batch was valid, shape ``(n_steps, mask_size)``; ``None`` without masks."""
        return self.column("action_mask", self.rows) if "action_mask" in self._columns else None

    @property
    def n_episodes(self) -> int:
        """Number of episodes in the batch."""
        return len(self.episodes)

    @property
    def n_steps(self) -> int:
        """Number of steps in the batch."""
        return self.pos if self._order is None else len(self._order)

    @property
    def first_half(self) -> float:
        """Share of the episodes of all processes that is the first half: every other one, or every other group."""
        n_parts = self.n_groups if self.n_groups > 1 else self.total_episodes
        return (n_parts + 1) // 2 / n_parts

    def chunks(self, size: int, whole_episodes: bool = False) -> Chunks:
        """
        Divide the finished batch into parts of about so many steps.

        :param size: Largest number of steps of a part
        :param whole_episodes: Whether no part may cut an episode; one that is longer than ``size`` is a part then
        :return: The parts
        """
        if not whole_episodes:
            return Chunks(self, [slice(start, start + size) for start in range(0, self.n_steps, size)])
        parts: list[slice] = []
        for end, length in zip(np.cumsum(self.lengths), self.lengths, strict=True):
            if parts and end - parts[-1].start <= size:
                parts[-1] = slice(parts[-1].start, end)
            else:
                parts.append(slice(end - length, end))
        return Chunks(self, parts)

    def get(self, batch_size: int | None = None) -> Iterator[EpisodeRolloutBufferSamples]:
        """
        Iterate over the finished batch, episode by episode. Nothing is rearranged: it can be iterated over again.

        :param batch_size: Number of steps per sample, ``None`` for all at once
        :return: Samples
        """
        assert self._order is not None, "finish() comes first"
        yield from self.chunks(batch_size or max(self.n_steps, 1))

    def get_minibatches(
        self, batch_size: int, whole_episodes: bool = False
    ) -> Iterator[tuple[EpisodeRolloutBufferSamples, int]]:
        """
        Iterate over the steps, or the episodes, of all processes in a random order, the same in every process.

        :param batch_size: Number of steps per minibatch; a mean, if it has to hold whole episodes
        :param whole_episodes: Whether to draw episodes instead of steps
        :return: What this process has of each minibatch, and the number of steps in it
        """
        if whole_episodes:
            total, first, own = self.total_episodes, self._first_episode, self.n_episodes
            batch_size = max(1, round(batch_size * self.total_episodes / self.total_steps))
            steps_of = np.split(np.arange(self.n_steps), np.cumsum(self.lengths)[:-1])
        else:
            total, first, own = self.total_steps, self._first_step, self.n_steps
        seed = on_first(lambda: np.random.randint(2**31))
        permutation = np.random.default_rng(seed).permutation(total) - first
        for start in range(0, total, batch_size):
            minibatch = permutation[start : start + batch_size]
            mine, size = minibatch[(0 <= minibatch) & (minibatch < own)], len(minibatch)
            if whole_episodes:
                mine = np.concatenate([self._NO_STEPS, *(steps_of[episode] for episode in mine)])
                size = int(all_sum(len(mine)))
            yield self._get_samples(mine), size

    def _get_samples(self, batch_inds: np.ndarray | slice) -> EpisodeRolloutBufferSamples:  # type: ignore[override]
        assert self._order is not None
        rows, has_masks = self._order[batch_inds], "action_mask" in self._columns
        observations = {key: self.to_torch(self.column(("obs", key), rows), copy=False) for key in self._obs_keys}
        actions = self.to_torch(self.column("action", rows), copy=False)
        # Distributions of vectors want floats, the one of integers wants those
        actions = actions[..., 0] if isinstance(self.action_space, spaces.Discrete) else actions.float()
        return EpisodeRolloutBufferSamples(
            observations=dict_to_obs(self.observation_space, observations),  # type: ignore[arg-type]
            actions=actions,
            advantages=self.to_torch(self.advantages[batch_inds], copy=False),
            targets=self.to_torch(self.targets[batch_inds], copy=False),
            halves=self.to_torch(self._halves[batch_inds], copy=False),
            episode_starts=self.to_torch(self.episode_starts[batch_inds], copy=False),
            action_masks=self.to_torch(self.column("action_mask", rows), copy=False) if has_masks else None,
        )

    def last_observation(self, episode: Episode, with_history: bool = False) -> EpisodeRolloutBufferSamples:
        """
        Make a sample of the observation after the last step of an episode.

        :param episode: An episode with a ``terminal_observation``
        :param with_history: Whether the observations of its steps come before it, for a policy with memory
        :return: A sample whose last step is this observation, and which holds nothing but observations
        """
        observation: Any = episode.terminal_observation
        arrays = observation if isinstance(observation, dict) else {None: observation}
        rows = episode._rows()[1] if with_history else self._NO_STEPS
        tensors = {}
        for key in self._obs_keys:
            history = self.column(("obs", key), rows)
            tensors[key] = self.to_torch(np.concatenate([history, np.asarray(arrays[key])[None].astype(history.dtype)]))
        starts = th.arange(len(rows) + 1, device=self.device) == 0
        return EpisodeRolloutBufferSamples(
            dict_to_obs(self.observation_space, tensors),  # type: ignore[arg-type]
            episode_starts=starts,
        )
