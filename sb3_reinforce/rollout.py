import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv

from sb3_reinforce.batch import Episode
from sb3_reinforce.batch_policy import has_memory
from sb3_reinforce.buffers import EpisodeRolloutBuffer
from sb3_reinforce.callbacks import all_callbacks
from sb3_reinforce.checks import check_finite
from sb3_reinforce.groups import Groups
from sb3_reinforce.masks import KEY, MASK_SOURCES, ActionMasks, MaskedModel, find_source
from sb3_reinforce.parallel.algorithm import DataParallelAlgorithm
from sb3_reinforce.parallel.processes import SharedRollout
from sb3_reinforce.quota import EpisodeQuota
from sb3_reinforce.resume.algorithm import ResumableAlgorithm
from sb3_reinforce.sampler import is_plain, make_sampler, reset_noise
from sb3_reinforce.vec_env.normalize import running_statistics
from sb3_reinforce.vec_env.shared_starts import check_starts, share_starts
from sb3_reinforce.vec_env.starts import is_at, mark_starts

#: Of a rollout, where ``n_episodes`` and ``target_steps`` are not given
DEFAULT_N_EPISODES, DEFAULT_TARGET_STEPS = 8, 512

#: Steps that a rollout buffer has room for at first.
INITIAL_BUFFER_SIZE = 2048

SelfEpisodic = TypeVar("SelfEpisodic", bound="EpisodicOnPolicyAlgorithm")


class EpisodicOnPolicyAlgorithm(ResumableAlgorithm, DataParallelAlgorithm):
    """
    The base for on-policy algorithms that learn from whole episodes, in one process or in several
    (:mod:`sb3_reinforce.parallel`).

    A rollout starts with the start of an episode in all environments and collects a fixed number of episodes from each of
    them (:class:`~sb3_reinforce.quota.EpisodeQuota`).

    :param n_episodes: Number of episodes per rollout, over all environments (of all processes). ``None``: 8, or one per
        environment if there are more
    :param target_steps: Collect more episodes if so many steps take more, going by the longer mean of the last two rollouts.
        ``None``: 512 without ``n_episodes``, otherwise 0
    :param max_episode_steps: Give up on an episode that is longer than this (it would never end)
    :param time_limit: ``"discard"`` leaves out the episodes that a time limit cut off
    :param use_masking: Whether to go by the action masks of the environment, if it offers them
    :param group_size: Number of episodes that share a start, 1 for starts of their own
    :param group_options: Function that gives the options of a group's resets for their seed
    :param kwargs: Arguments of ``OnPolicyAlgorithm``
    """

    rollout_buffer: EpisodeRolloutBuffer  # type: ignore[assignment]

    #: Number of time steps at the start of the rollout
    _rollout_start = 0

    #: Mean lengths of the episodes of the last two rollouts, in steps. Saved with the model
    _mean_episode_lengths: Sequence[float] = ()

    #: Marks the starts of episodes at which the environments were left
    _starts: list[Any] | None = None

    #: Whether the environments have been told, and can be told again, how their episodes start
    _shares_starts = False

    #: Where the action masks of the last rollout came from. Saved with the model
    mask_source: str | None = None

    #: Which environments still owe episodes to the rollout. Callbacks can go by ``quota.owing``
    quota: EpisodeQuota | None = None

    def __init__(
        self,
        *args: Any,
        n_episodes: int | None,
        target_steps: int | None,
        max_episode_steps: int,
        time_limit: str | None,
        use_masking: bool,
        group_size: int = 1,
        group_options: Callable[[int], dict[str, Any]] | None = None,
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
        self.target_steps = target_steps
        self.max_episode_steps = max_episode_steps
        self.time_limit = time_limit
        self.use_masking = use_masking
        self.group_size = group_size
        self.group_options = group_options
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        if self.rollout_buffer_class is None:
            self.rollout_buffer_class = EpisodeRolloutBuffer  # type: ignore[assignment]
        super()._setup_model()
        if self.verbose >= 1:
            print(f"Sampling actions with {'NumPy' if is_plain(self.policy) else 'PyTorch'}")

    @property
    def bootstraps(self) -> bool:
        """Whether a critic judges the observations after episodes that a time limit cut off."""
        return False

    @property
    def plays_greedy(self) -> bool:
        """Whether each group has a greedy episode besides those that are learned from."""
        return False

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "quota", "_starts", "_shares_starts"]

    def _check_n_envs(self, n_envs: int) -> None:
        if self.n_episodes is not None and self.n_episodes < n_envs:
            raise ValueError(f"n_episodes={self.n_episodes} must be at least the number of environments, {n_envs}, or None")

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Set the environment to learn from. Unlike in SB3, it can hold another number of environments than the one
        before: between two rollouts nothing depends on it.

        :param env: The environment
        :param force_reset: Not used: the next rollout starts from a reset
        :raises ValueError: If its spaces differ, or ``n_episodes`` is less than its number of environments
        """
        env = self._wrap_env(env, self.verbose)
        check_for_correct_spaces(env, self.observation_space, self.action_space)
        self._check_n_envs(env.num_envs)
        self.n_envs, self._shares_starts = env.num_envs, False
        super().set_env(env, force_reset=True)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Get the policy action from an observation (and optional hidden state).

        :param observation: The input observation
        :param state: The last hidden states, for a policy with memory
        :param episode_start: Whether the observations start an episode, where hidden states are zero
        :param deterministic: Whether to take the likeliest action instead of a sample
        :param action_masks: Whether each action is valid, shape ``(n_envs, mask_size)``, see :mod:`sb3_reinforce.masks`.
            ``None``: those in the observation, if the model has learned with such
        :return: The action, and the next hidden states
        """
        if has_memory(self.policy) and state is None and not (episode_start is None or np.all(episode_start)):
            warnings.warn(
                "A policy with memory is to go on with an episode without its state: hand on the state that predict has "
                "returned. (sb3_contrib's evaluate_policy with masks does not: take SB3's, and MaskedModel(model, vec_env))"
            )
        if action_masks is None and self.mask_source == "observation":
            action_masks = observation[KEY]
        if action_masks is not None:
            return self.policy.predict(observation, state, episode_start, deterministic, action_masks)  # type: ignore[call-arg]
        if self.mask_source is not None:
            warnings.warn(
                "The model has learned with action masks, and is to predict without: give predict(..., action_masks=...), and "
                "evaluate with evaluate_policy(MaskedModel(model, vec_env), vec_env)"
            )
        return super().predict(observation, state, episode_start, deterministic)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        self._last_obs = None  # Somebody may have stepped the environments since the last call: SB3 resets them
        total_timesteps, callback = super()._setup_learn(*args, **kwargs)
        self._starts = mark_starts(self.env)  # type: ignore[arg-type]
        return total_timesteps, callback

    def learn(self: SelfEpisodic, *args: Any, **kwargs: Any) -> SelfEpisodic:
        try:
            return super().learn(*args, **kwargs)
        finally:  # Also where a callback or an error has stopped a rollout, unless it left processes in the middle of a step
            if self._shares_starts and not getattr(self.env.unwrapped, "waiting", False):  # type: ignore[union-attr]
                self.env.env_method("forget_starts")  # type: ignore[union-attr]

    def dump_logs(self, iteration: int = 0) -> None:
        """
        Write log, with the environment's own rewards where others were learned from (:mod:`sb3_reinforce.episode_reward`).

        :param iteration: Current logging iteration
        """
        own = [record["env_r"] for record in self.ep_info_buffer or () if "env_r" in record]
        if own:
            self.logger.record("rollout/ep_env_rew_mean", float(np.mean(own)))
        super().dump_logs(iteration)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # The progress at the start of the rollout: its end can be far beyond the total, for which a schedule has no value, and
        # a call of learn that is one rollout long would see nothing but the end of its schedules
        super()._update_current_progress_remaining(self._rollout_start, total_timesteps)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        callback = super()._init_callback(callback, progress_bar)
        if self.use_masking and not isinstance(self.action_space, spaces.Box):
            for child in all_callbacks(callback):
                if isinstance(child, EvalCallback):  # The masks are those of the environment of the evaluation
                    child.model = MaskedModel(self, child.eval_env)  # type: ignore[assignment]
        return callback

    def _make_quota(self, n_envs: int) -> EpisodeQuota:
        first_env, total_envs = self.locate_envs(n_envs)
        self._check_n_envs(total_envs)
        n_episodes = self.n_episodes or math.ceil(max(DEFAULT_N_EPISODES, total_envs) / self.group_size) * self.group_size
        steps = (0 if self.n_episodes else DEFAULT_TARGET_STEPS) if self.target_steps is None else self.target_steps
        # Known before the rollout, which keeps the estimate unbiased
        wanted = math.ceil(steps / max(self._mean_episode_lengths, default=math.inf) - 1e-9)
        if wanted > n_episodes:
            unit = math.lcm(total_envs, self.group_size)
            n_episodes = math.ceil(wanted / unit) * unit
        if self.plays_greedy:
            n_episodes += n_episodes // self.group_size
        return EpisodeQuota(n_episodes, n_envs, self.max_episode_steps, first_env, total_envs)

    def _group_episodes(self, env: VecEnv, quota: EpisodeQuota) -> Groups:
        """
        Divide the episodes of a rollout into groups, and tell the environments their starts if groups share them.

        :param env: The environment, which is about to be reset in that case
        :param quota: The episodes
        :return: The groups
        :raises ValueError: If the starts cannot be told, or two starts with one seed differ
        """
        groups = Groups(quota, self.group_size, self.plays_greedy)
        if groups.are_shared:
            if not self._shares_starts:
                share_starts(env)
                check_starts(env, self.group_options)
                self._shares_starts = True
            groups.queue(env, self.group_options)
        return groups

    def _find_masks(self, env: VecEnv) -> ActionMasks | None:
        """
        Find the action masks that the environment offers, if they are wanted.

        :param env: The environment, after a reset
        :return: What reads them
        :raises ValueError: If the policy cannot go by them
        """
        source = find_source(env) if self.use_masking else None
        if source and "action_masks" not in inspect.signature(self.policy.predict).parameters:
            raise ValueError(
                f"The environment has action masks, and {type(self.policy).__name__}.predict takes none: derive the policy "
                "from sb3_reinforce.policies.ReinforcePolicy, or ignore the masks with use_masking=False"
            )
        if source != self.mask_source:
            self.mask_source = source
            if self.verbose >= 1:
                print(f"Action masks: {MASK_SOURCES[source]}")
        return ActionMasks(env, source) if source else None

    def _env_actions(self, actions: np.ndarray) -> np.ndarray:
        """
        Turn sampled actions into actions that the environments can take.

        :param actions: Actions as the policy samples them, shape ``(n_envs, *action_shape)``
        :return: Clipped (or unscaled) actions, of the same shape
        """
        if not isinstance(self.action_space, spaces.Box):
            return actions
        if self.policy.squash_output:
            return self.policy.unscale_action(actions)
        # np.clip without its overhead, nor that of broadcasting for one environment
        return np.minimum(np.maximum(actions, self.action_space.low[None]), self.action_space.high[None])

    def _end_episodes(
        self,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
        n_steps: int,
        rollout_buffer: EpisodeRolloutBuffer,
        groups: Groups,
    ) -> list[dict[str, Any]]:
        """
        Store how the episodes ended that count.

        :param dones: Whether the last step ended the episode, shape ``(n_envs,)``
        :param infos: Infos of that step
        :param n_steps: Number of steps since the start of the rollout
        :param rollout_buffer: Buffer that holds the steps
        :param groups: Groups of the rollout
        :return: What the infos say about the episodes that are learned from
        :raises ValueError: If the critic is to judge an observation that the environment does not give
        """
        assert self.quota is not None
        finished = self.quota.finish(dones, n_steps)
        sampled: list[dict[str, Any]] = []
        for env_idx in finished:
            truncated = bool(infos[env_idx].get("TimeLimit.truncated", False))
            last = deepcopy(infos[env_idx].get("terminal_observation"))  # Some environments reuse its array
            if last is None and truncated and self.bootstraps:
                raise ValueError(
                    f"Environment {env_idx} gives no infos['terminal_observation'] for an episode that a time limit cut off, "
                    "and time_limit='bootstrap' (the default with baseline='value') needs it. Let the vectorized environment "
                    "give it (as SB3's do), or choose time_limit='terminal'"
                )
            record, kind = infos[env_idx].get("episode"), groups.finish(env_idx)
            rollout_buffer.end_episode(Episode(env_idx, truncated, last, record=record, **kind))
            if not kind["is_greedy"]:
                self._update_info_buffer([infos[env_idx]], np.array([True]))
                sampled.append({key: infos[env_idx].get(key) for key in ("episode", "is_success")})
        if self.use_sde and len(finished) and not self.quota.is_met:
            # Episodes that share their noise would be no baseline for each other
            reset_noise(self.policy, finished, len(dones))
        return sampled

    def _share_infos(self, shared: SharedRollout) -> None:
        infos_of_others = shared.infos_of_others()
        self._update_info_buffer(infos_of_others, np.ones(len(infos_of_others), dtype=bool))

    def collect_rollouts(  # type: ignore[override]
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: EpisodeRolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """
        Collect whole episodes with the current policy and fill an ``EpisodeRolloutBuffer``. Environments that have given their
        quota are stepped until the others have too; these surplus steps count as time steps, but enter nothing else.

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
        callback.on_rollout_start()
        # Nothing random comes before this hook: training states are saved and restored there
        self.between_updates(callback)

        # Start an episode everywhere, unless the last step or reset did: no hidden reset is to use up a start
        statistics = running_statistics(env)
        # Some environments can be left alone when they have met their quota, unless their repetitions enter the statistics
        step_only = None if statistics else getattr(env.unwrapped, "step_only", None)
        shared, sampler = SharedRollout(statistics), make_sampler(self.policy, env.num_envs)
        self.quota = quota = self._make_quota(env.num_envs)
        n_steps, self._rollout_start = 0, self.num_timesteps
        if self.use_sde:
            self.policy.reset_noise(env.num_envs)
        groups = self._group_episodes(env, quota)
        is_started = not groups.are_shared and self._last_obs is not None and is_at(env, self._starts)
        # Callbacks that were written for A2C read them. They are not computed in the rollout, hence NaN
        values, log_probs = th.full((env.num_envs, 1), th.nan), th.full((env.num_envs,), th.nan)
        obs: Any = self._last_obs if is_started else env.reset()
        self._last_obs = None
        read_masks, action_masks = self._find_masks(env), None
        dones: np.ndarray = np.ones(env.num_envs, dtype=bool)
        infos: list[dict[str, Any]] = [{}] * env.num_envs

        while True:
            # Sample actions. They are stored before the step, in which some environments overwrite the observations
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                self.policy.reset_noise(env.num_envs)
            check_finite("observation", obs, n_steps)
            if read_masks is not None:
                action_masks = read_masks(obs, dones, infos)
            actions = sampler(obs, action_masks, groups.greedy)
            rollout_buffer.add(obs, actions, quota.owing, action_masks)

            # Step the environments
            clipped_actions = self._env_actions(actions)
            new_obs, rewards, dones, infos = env.step(clipped_actions)
            dones = np.asarray(dones, dtype=bool)
            self.num_timesteps += env.num_envs if step_only is None else len(quota.owing)

            # Give access to local variables
            callback.update_locals(locals())
            is_over = is_stopped = not callback.on_step()

            # Store the outcome. Most steps end no episode
            if not is_stopped:
                check_finite("reward", rewards, n_steps)
                rollout_buffer.add_outcome(rewards, dones, infos)
                obs, n_steps = new_obs, n_steps + 1
                if np.count_nonzero(dones):
                    sampler.start_episodes(dones)
                    shared.episode_infos += self._end_episodes(dones, infos, n_steps, rollout_buffer, groups)
                    is_over = quota.is_met
                    if step_only is not None and not is_over:
                        step_only(quota.owing)

            if is_over:
                break
            quota.check_lengths(n_steps)

        # The processes meet when their quotas are met, or when a callback stops one of them
        counts = shared.meet(
            self.num_timesteps - self._rollout_start,
            rollout_buffer.n_steps,
            rollout_buffer.n_episodes,
            last_step=n_steps if dones.all() else -1,
            is_stopped=is_stopped,
        )
        self.num_timesteps = self._rollout_start + counts.timesteps
        shared.merge_statistics()
        if counts.is_stopped:
            self._share_infos(shared)
            return False
        self.logger.record("rollout/episodes", counts.episodes - groups.n_greedy)
        self.logger.record("rollout/steps", counts.steps)
        self.logger.record("rollout/surplus_steps", self.num_timesteps - self._rollout_start - counts.steps)
        self._mean_episode_lengths = [*self._mean_episode_lengths[-1:], counts.steps / counts.episodes]
        rollout_buffer.finish(discard_truncated=self.time_limit == "discard")
        if read_masks is not None and (masks := rollout_buffer.action_masks) is not None:
            read_masks.layout.check_actions(rollout_buffer.actions, masks)
        if counts.are_all_done:  # SB3's vectorized environments have started the next episode everywhere
            self._last_obs, self._starts = new_obs, mark_starts(env)  # type: ignore[assignment]

        callback.update_locals(locals())

        callback.on_rollout_end()

        # After the callbacks, which can judge the episodes anew
        self._share_infos(shared)

        return True
