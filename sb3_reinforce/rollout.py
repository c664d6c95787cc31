import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.utils import check_for_correct_spaces, obs_as_tensor, set_random_seed
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs

from sb3_reinforce import distributed
from sb3_reinforce.actor import FastActor, is_plain
from sb3_reinforce.buffers import Episode, EpisodeRolloutBuffer
from sb3_reinforce.checkpoint import (
    TrainingStateCallback,
    all_callbacks,
    is_plain_value,
    restore,
    running_statistics,
)
from sb3_reinforce.checks import check_finite, check_number

#: Episodes per update where ``n_episodes`` is not given: one per environment, but not less than this.
DEFAULT_N_EPISODES = 8

#: Steps that a rollout buffer has room for at first.
INITIAL_BUFFER_SIZE = 2048

#: Arguments in which processes that train together can differ
OWN_ARGUMENTS = {"seed", "verbose", "device", "tensorboard_log"}


class EpisodicOnPolicyAlgorithm(OnPolicyAlgorithm):
    """
    The base for on-policy algorithms that learn from whole episodes, in one process or in several
    (:mod:`sb3_reinforce.distributed`).

    A rollout starts from a reset of all environments and collects a fixed number of episodes from each of them, so
    that it does not over-represent short episodes, as the first episodes to finish would.

    :param n_episodes: Number of episodes per rollout, over all environments (of all processes); environment ``i`` of
        ``n_envs`` gives ``(n_episodes + i) // n_envs`` of them. ``None``: 8, or one per environment if there are more.
    :param min_steps: Repeat the quota until the rollout has this many steps, before any are discarded
    :param max_episode_steps: Give up on an episode that is longer than this (it would never end)
    :param time_limit: ``"discard"`` leaves out the episodes that a time limit cut off
    :param kwargs: Arguments of ``OnPolicyAlgorithm``
    """

    rollout_buffer: EpisodeRolloutBuffer  # type: ignore[assignment]

    #: What a resumed run goes on from, until its first rollout
    _state_to_restore: dict[str, Any] | None = None

    def __init__(
        self,
        *args: Any,
        n_episodes: int | None,
        min_steps: int,
        max_episode_steps: int,
        time_limit: str,
        _init_setup_model: bool = True,
        **kwargs: Any,
    ):
        kwargs.update(
            n_steps=INITIAL_BUFFER_SIZE,  # the buffer grows, it is the episodes that end a rollout
            vf_coef=0.0,  # the critic has an optimizer of its own
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
            _init_setup_model=False,
        )
        try:
            super().__init__(*args, **kwargs)
        except AssertionError as error:  # SB3's way of refusing an action space
            if "action space" not in str(error):
                raise
            raise ValueError(str(error)) from error
        self.n_episodes = n_episodes
        self.min_steps = min_steps
        self.max_episode_steps = max_episode_steps
        self.time_limit = time_limit
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        distributed.join()
        self._check_arguments()
        if self.rollout_buffer_class is None:
            self.rollout_buffer_class = EpisodeRolloutBuffer  # type: ignore[assignment]
        super()._setup_model()
        if distributed.rank() > 0:
            self.verbose, self.tensorboard_log = 0, None
        if self.verbose >= 1:
            print(f"Sampling actions with {'NumPy' if is_plain(self.policy) else 'PyTorch'}")

    def _check_arguments(self) -> None:
        """
        :raises ValueError: If an argument has no sense, on its own or for the environment
        """
        if self.n_episodes is not None:
            check_number("n_episodes", self.n_episodes, 1, integer=True, or_else="None")
        if self.env is not None:
            self._check_n_envs(self.env.num_envs)
        check_number("min_steps", self.min_steps, 0, integer=True)
        check_number("max_episode_steps", self.max_episode_steps, 1, integer=True)
        buffer_class = self.rollout_buffer_class
        if buffer_class is not None and not (
            isinstance(buffer_class, type) and issubclass(buffer_class, EpisodeRolloutBuffer)
        ):
            raise ValueError(
                f"rollout_buffer_class={getattr(buffer_class, '__name__', repr(buffer_class))} must be an EpisodeRolloutBuffer"
            )
        action_space = getattr(self, "action_space", None)  # Not without an environment
        if isinstance(action_space, spaces.MultiBinary | spaces.MultiDiscrete) and len(action_space.shape) > 1:
            raise ValueError(f"{action_space} has more than one dimension, which is not supported: flatten it")

    def _check_n_envs(self, n_envs: int) -> None:
        n_envs *= distributed.world_size()
        if self.n_episodes is not None and self.n_episodes < n_envs:
            raise ValueError(f"n_episodes={self.n_episodes} must be at least the number of environments, {n_envs}, or None")

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Set the seed of the pseudo-random generators (python, numpy, pytorch, gym, action_space). The environments of several
        processes are seeded as one process would seed them all, and their samples differ.

        :param seed: Seed, ``None`` for no change
        """
        super().set_random_seed(seed)
        if seed is None or distributed.rank() == 0:
            return
        own_seed = int(np.random.SeedSequence([seed, distributed.rank()]).generate_state(1)[0])
        set_random_seed(own_seed, using_cuda=self.device.type == "cuda")
        if self.env is not None:
            self.env.seed(seed + distributed.rank() * self.env.num_envs)

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Set the environment to learn from. Unlike in SB3, it can hold another number of environments than the one
        before: between two rollouts nothing depends on it.

        :param env: The environment
        :param force_reset: Not used: every rollout starts from a reset
        :raises ValueError: If its spaces differ, or ``n_episodes`` is less than its number of environments
        """
        env = self._wrap_env(env, self.verbose)
        check_for_correct_spaces(env, self.observation_space, self.action_space)
        self._check_n_envs(env.num_envs)
        self.n_envs = env.num_envs
        super().set_env(env, force_reset=True)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        """
        One process logs, evaluates and saves: callbacks are called in process 0 only. Training states, which are made of the
        states of all processes, are the exception.

        :param callback: Callback(s) called at every step with state of the algorithm.
        :param progress_bar: Display a progress bar using tqdm and rich.
        :return: A callback
        """
        if distributed.rank() > 0:
            given = callback if isinstance(callback, list) else [callback]
            seen: list[BaseCallback] = []
            found = [child for each in given if isinstance(each, BaseCallback) for child in all_callbacks(each, seen)]
            callback, progress_bar = [child for child in found if isinstance(child, TrainingStateCallback)], False
            self._logger = Logger(None, [])
        callback = super()._init_callback(callback, progress_bar)
        self._check_agreement(callback)
        distributed.broadcast(self.policy.state_dict().values())
        assert self.env is not None
        statistics = running_statistics(self.env)
        for rms, first in zip(statistics, distributed.on_first(lambda: statistics), strict=True):
            vars(rms).update(vars(first))
        return callback

    def _check_agreement(self, callback: BaseCallback) -> None:
        """
        :param callback: Callback of the training
        :raises ValueError: If the processes are not about to do the same
        """
        assert self.env is not None
        names = inspect.signature(type(self)).parameters.keys() - OWN_ARGUMENTS
        mine = {name: getattr(self, name, None) for name in sorted(names)}
        mine = {name: value for name, value in mine.items() if is_plain_value(value)}
        mine["total_timesteps"], mine["num_timesteps"] = self._total_timesteps, self.num_timesteps
        mine["parameters"] = {name: tuple(value.shape) for name, value in self.policy.state_dict().items()}
        mine["training states"] = sum(isinstance(child, TrainingStateCallback) for child in all_callbacks(callback))
        has_batch_norm = any(isinstance(module, th.nn.modules.batchnorm._BatchNorm) for module in self.policy.modules())
        if distributed.world_size() > 1 and has_batch_norm:
            raise ValueError(
                "Batch normalization is not supported in several processes: each would have statistics of its own"
            )
        first, *others = distributed.gather(mine)
        for process, other in enumerate(others, 1):
            for name in mine:
                if other[name] != first[name]:
                    raise ValueError(
                        f"The processes must train the same model: {name} is {first[name]} in process 0 and "
                        f"{other[name]} in process {process}"
                    )
        self._check_n_envs(math.ceil(distributed.all_sum(self.env.num_envs) / distributed.world_size()))

    def save(self, *args: Any, **kwargs: Any) -> None:
        """As in SB3; of several processes, the first one saves."""
        if distributed.rank() == 0:
            super().save(*args, **kwargs)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # The last rollout can go far beyond the total, and a schedule must not be asked for what comes after its end
        super()._update_current_progress_remaining(min(num_timesteps, total_timesteps), total_timesteps)

    def _sample_actions(self, obs: VecEnvObs) -> np.ndarray:
        """
        :param obs: Observations of all environments, shape ``(n_envs, *obs_shape)``, or a dict of them
        :return: Actions as the policy samples them, shape ``(n_envs, *action_shape)``
        """
        with th.no_grad():
            actions = self.policy.get_distribution(obs_as_tensor(obs, self.device)).get_actions()  # type: ignore[arg-type]
        return actions.reshape((-1, *self.action_space.shape)).cpu().numpy()  # type: ignore[misc]

    def _actor(self, n_envs: int) -> Callable[[VecEnvObs], np.ndarray]:
        """
        :param n_envs: Number of environments
        :return: What samples the actions of a rollout, as :meth:`_sample_actions` does
        """
        return FastActor(self.policy, n_envs) if is_plain(self.policy) else self._sample_actions

    def _env_actions(self, actions: np.ndarray) -> np.ndarray:
        """
        :param actions: Actions as the policy samples them, shape ``(n_envs, *action_shape)``
        :return: Actions that the environments can take, of the same shape
        """
        if not isinstance(self.action_space, spaces.Box):
            return actions
        if self.policy.squash_output:
            return self.policy.unscale_action(actions)
        # np.clip without its overhead, nor that of broadcasting for one environment
        return np.minimum(np.maximum(actions, self.action_space.low[None]), self.action_space.high[None])

    def _end_episodes(
        self, finished: np.ndarray, infos: list[dict[str, Any]], rollout_buffer: EpisodeRolloutBuffer
    ) -> list[dict[str, Any]]:
        """
        :param finished: Indices of the environments whose last stored step ended an episode
        :param infos: Infos of that step, of all environments
        :param rollout_buffer: Buffer to tell
        :return: What the infos say about the whole episodes
        """
        for env_idx in finished:
            info = infos[env_idx]
            truncated = bool(info.get("TimeLimit.truncated", False))
            bootstrap = truncated and self.time_limit == "bootstrap"
            rollout_buffer.end_episode(Episode(env_idx, truncated, info["terminal_observation"] if bootstrap else None))
            self._update_info_buffer([info], np.array([True]))
        return [{key: infos[env_idx].get(key) for key in ("episode", "is_success")} for env_idx in finished]

    def _end_round(self, is_stopped: bool, first_timestep: int, n_timesteps: int, n_steps: int) -> tuple[bool, int]:
        """
        Where the processes meet: at the end of a round of episodes, or when a callback stops one of them.

        :param is_stopped: Whether this process is stopped
        :param first_timestep: Time step at the start of the rollout
        :param n_timesteps: Time steps of this process since then
        :param n_steps: Those of them that are in its rollout buffer
        :return: Whether a process is stopped, and the steps in all rollout buffers
        """
        stopped, total_timesteps, total_steps = distributed.all_sum([is_stopped, n_timesteps, n_steps])
        self.num_timesteps = first_timestep + int(total_timesteps)
        return stopped > 0, int(total_steps)

    def _gather_statistics(self, episode_infos: list[dict[str, Any]], env: VecEnv, before: list[RunningMeanStd]) -> None:
        """
        Give all processes the statistics of all: those of the episodes, and those of normalization.

        :param episode_infos: Infos of the episodes of this process
        :param env: The training environment
        :param before: The statistics of normalization at the start of the rollout
        """
        for process, infos in enumerate(distributed.gather(episode_infos)):
            if process != distributed.rank():
                self._update_info_buffer(infos, np.ones(len(infos), dtype=bool))
        for rms, rms_before in zip(running_statistics(env), before, strict=True):
            distributed.merge_statistics(rms, rms_before)

    def _check_episode_lengths(self, lengths: np.ndarray, watched: np.ndarray) -> None:
        """
        :param lengths: Steps of the running episode of each environment, shape ``(n_envs,)``
        :param watched: Indices of the environments whose episodes are waited for
        :raises ValueError: If one of these is too long
        """
        if lengths[watched].max() >= self.max_episode_steps:
            raise ValueError(
                f"Environment {watched[lengths[watched].argmax()]} has not finished its episode after "
                f"max_episode_steps={self.max_episode_steps} steps, and REINFORCE learns from finished episodes. Give it "
                "a time limit, for example gymnasium.make(env_id, max_episode_steps=1000), or allow for longer episodes"
            )

    def _between_updates(self, callback: BaseCallback) -> None:
        """
        Go on from a training state, if there is one, and save one, where a callback wants it.

        :param callback: The callback that training calls
        """
        if self._state_to_restore is not None:
            restore(self, callback, self._state_to_restore)
            self._state_to_restore = None
            return
        for child in all_callbacks(callback):
            if isinstance(child, TrainingStateCallback):
                child.on_update_end(callback)

    def collect_rollouts(  # type: ignore[override]
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: EpisodeRolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """
        Collect whole episodes with the current policy and fill an ``EpisodeRolloutBuffer``.

        Environments that have given their quota are stepped until the others have too. These surplus steps count as
        time steps, but they do not enter the buffer, nor the episode statistics.

        :param env: The training environment
        :param callback: Callback that will be called at each step (and at the beginning and end of the rollout)
        :param rollout_buffer: Buffer to fill
        :param n_rollout_steps: Not used: a rollout is over when its last episode is
        :return: False if the callback stopped the rollout, True otherwise
        :raises ValueError: If an observation or a reward is not finite, or an episode does not end
        """
        # Switch to eval mode (this affects batch norm / dropout)
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        # Nothing random comes before it: this is where training states are saved
        callback.on_rollout_start()
        self._between_updates(callback)
        if self.use_sde:
            self.policy.reset_noise(env.num_envs)

        all_envs = distributed.by_rank([env.num_envs]).astype(int)
        first_env, total_envs = all_envs[: distributed.rank()].sum(), all_envs.sum()
        n_episodes = self.n_episodes or max(DEFAULT_N_EPISODES, total_envs)
        quotas = (n_episodes + first_env + np.arange(env.num_envs)) // total_envs
        remaining = quotas.copy()
        watched = np.arange(env.num_envs)
        nothing = watched[:0]
        n_steps, n_timesteps, first_timestep = 0, 0, self.num_timesteps
        episode_starts = np.zeros(env.num_envs, dtype=int)
        # No running episode can be too long before this step
        deadline = self.max_episode_steps
        statistics = [rms.copy() for rms in running_statistics(env)]
        episode_infos: list[dict[str, Any]] = []
        obs = env.reset()
        act = self._actor(env.num_envs)
        # Some environments can be left alone when they have met their quota, unless what they repeat enters the statistics
        step_only = None if statistics else getattr(env.unwrapped, "step_only", None)
        n_stepped = env.num_envs

        while True:
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                self.policy.reset_noise(env.num_envs)
            check_finite("observation", obs, n_steps)
            actions = act(obs)
            clipped_actions = self._env_actions(actions)
            new_obs, rewards, dones, infos = env.step(clipped_actions)

            n_timesteps += n_stepped
            self.num_timesteps += n_stepped

            # Give access to local variables
            callback.update_locals(locals())
            if not callback.on_step():
                self._end_round(True, first_timestep, n_timesteps, 0)
                self._gather_statistics(episode_infos, env, statistics)
                return False

            check_finite("reward", rewards, n_steps)
            rollout_buffer.add(obs, actions, rewards, dones, watched)
            obs = new_obs
            n_steps += 1

            # Most steps end no episode
            finished = watched[dones[watched]] if np.count_nonzero(dones) else nothing
            if len(finished) > 0:
                episode_infos += self._end_episodes(finished, infos, rollout_buffer)
                remaining[finished] -= 1
                episode_starts[finished] = n_steps
                watched = np.flatnonzero(remaining)
                if len(watched) == 0:
                    is_stopped, total_steps = self._end_round(False, first_timestep, n_timesteps, rollout_buffer.n_steps)
                    if is_stopped:  # By a callback of another process
                        self._gather_statistics(episode_infos, env, statistics)
                        return False
                    if total_steps >= self.min_steps:
                        break
                if self.use_sde:  # Episodes that share their noise would be no baseline for each other
                    self.policy.reset_noise(env.num_envs)
                if len(watched) == 0:  # One more round of the quota
                    remaining = quotas.copy()
                    watched = np.arange(env.num_envs)
                    episode_starts[:] = n_steps
                    obs = env.reset()
                    n_stepped = env.num_envs
                elif step_only is not None and len(watched) < n_stepped:
                    step_only(watched)
                    n_stepped = len(watched)
            if n_steps >= deadline:
                self._check_episode_lengths(n_steps - episode_starts, watched)
                deadline = episode_starts[watched].min() + self.max_episode_steps

        self._gather_statistics(episode_infos, env, statistics)
        self.logger.record("rollout/episodes", int(distributed.all_sum(rollout_buffer.n_episodes)))
        self.logger.record("rollout/steps", total_steps)
        self.logger.record("rollout/surplus_steps", self.num_timesteps - first_timestep - total_steps)
        rollout_buffer.finish(discard_truncated=self.time_limit == "discard")

        callback.update_locals(locals())

        callback.on_rollout_end()

        return True
