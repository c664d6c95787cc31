"""Which environments still owe episodes to a batch. Knows neither SB3 nor PyTorch."""

import numpy as np


class EpisodeQuota:
    """
    Count the episodes that each environment still owes to a batch.

    Environment ``i`` of ``n`` owes ``(n_episodes + i) // n`` episodes, as in SB3's ``evaluate_policy``. A quota that is
    fixed beforehand keeps the batch unbiased: the first ``n_episodes`` to finish would over-represent short ones.

    :param n_episodes: Number of episodes, over the environments of all processes
    :param n_envs: Number of environments of this process
    :param max_episode_steps: Longest episode allowed, in steps
    :param first_env: Index of the first environment of this process among those of all processes
    :param total_envs: Number of environments of all processes, ``None`` for ``n_envs``
    """

    #: No environment
    NONE = np.zeros(0, dtype=int)

    #: Indices of the environments that still owe episodes, in ascending order
    owing: np.ndarray

    def __init__(
        self, n_episodes: int, n_envs: int, max_episode_steps: int, first_env: int = 0, total_envs: int | None = None
    ):
        total_envs = total_envs or n_envs
        self.n_episodes, self.first_env, self.total_envs = n_episodes, first_env, total_envs
        self.quotas = (n_episodes + first_env + np.arange(n_envs)) // total_envs
        # Round by round; the environments that the last round leaves out are the first ones
        n_rounds, n_last = divmod(n_episodes, total_envs)
        rounds = [np.arange(quota) for quota in self.quotas]
        #: Numbers of the episodes of each environment among those of all processes, in the order in which they begin
        self.numbers = [
            total_envs * played + env_idx - (played == n_rounds) * (total_envs - n_last)
            for env_idx, played in enumerate(rounds, start=first_env)
        ]
        self.max_episode_steps = max_episode_steps
        self._remaining = self.quotas.copy()
        self._starts = np.zeros(n_envs, dtype=int)
        self._next_check = max_episode_steps
        self.owing = np.flatnonzero(self._remaining)

    @property
    def is_met(self) -> bool:
        """Whether no environment owes an episode."""
        return len(self.owing) == 0

    def finish(self, dones: np.ndarray, step: int) -> np.ndarray:
        """
        Count the episodes that have ended.

        :param dones: Whether the last step ended the episode, shape ``(n_envs,)``
        :param step: Number of steps since the start of the rollout
        :return: Indices of the environments that have paid an episode
        """
        finished = self.owing[dones[self.owing]]
        if len(finished):
            self._remaining[finished] -= 1
            self._starts[finished] = step
            self.owing = np.flatnonzero(self._remaining)
        return finished

    def number(self, env_idx: int) -> int:
        """
        Tell which of the episodes of all processes an environment has paid last.

        :param env_idx: Index of the environment
        :return: Number of the episode, from 0
        """
        return int(self.numbers[env_idx][self.quotas[env_idx] - self._remaining[env_idx] - 1])

    def check_lengths(self, step: int) -> None:
        """
        Check that the episodes that are waited for come to an end.

        :param step: Number of steps since the start of the rollout
        :raises ValueError: If one of them is longer than allowed
        """
        if step < self._next_check or self.is_met:
            return
        starts = self._starts[self.owing]
        if step - starts.min() >= self.max_episode_steps:
            raise ValueError(
                f"Environment {self.owing[starts.argmin()]} has not finished its episode after "
                f"max_episode_steps={self.max_episode_steps} steps, and REINFORCE learns from finished episodes. Give it "
                "a time limit, for example gymnasium.make(env_id, max_episode_steps=1000), or allow for longer episodes"
            )
        self._next_check = int(starts.min()) + self.max_episode_steps
