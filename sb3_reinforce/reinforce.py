import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import LinearSchedule

from sb3_reinforce.advantages import ROUNDING, compute_advantages, count_without_signal, describe, to_single_precision, weights
from sb3_reinforce.arguments import HINTS, MIN_N_EPISODES, check_arguments, resolve_gae_lambda
from sb3_reinforce.batch import Chunks, flat_observations
from sb3_reinforce.batch_policy import batch_policy, has_memory
from sb3_reinforce.buffers import EpisodeRolloutBuffer
from sb3_reinforce.checks import evaluate, explain_unknown_arguments, to_schedule
from sb3_reinforce.critic import Critic
from sb3_reinforce.gradient import PolicyGradient, policy_gradient
from sb3_reinforce.line_search import PolicyStep, adapt_learning_rate
from sb3_reinforce.natural_gradient import fisher_vector_product, natural_gradient
from sb3_reinforce.parallel.processes import all_max, rank
from sb3_reinforce.policies import ReinforceCnnPolicy, ReinforceMultiInputPolicy, ReinforcePolicy
from sb3_reinforce.recurrent import ReinforceCnnLstmPolicy, ReinforceLstmPolicy, ReinforceMultiInputLstmPolicy
from sb3_reinforce.rollout import EpisodicOnPolicyAlgorithm
from sb3_reinforce.watch import Watch

SelfREINFORCE = TypeVar("SelfREINFORCE", bound="REINFORCE")

#: Long steps at first, short ones at the end, so that the final policy is not one long step away from a good one.
DEFAULT_TARGET_KL = LinearSchedule(0.05, 0.005, 1.0)


class REINFORCE(EpisodicOnPolicyAlgorithm):
    """
    REINFORCE (Monte-Carlo policy gradient). Every update takes ``N`` complete episodes of the current policy and makes one
    step along the gradient estimate ``g = 1/N sum_i sum_t w_t grad log pi(a_it | s_it) (R_it - b_it)``.

    Papers: Williams, Simple statistical gradient-following algorithms for connectionist reinforcement learning,
    Machine Learning 8, 1992; Sutton & Barto, Reinforcement Learning: An Introduction, 2nd ed., sections 13.3 and 13.4.

    Log-probabilities are those of the sampled action; the environment gets it clipped to the bounds of its space.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MlpLstmPolicy, ...)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: The learning rate, it can be a function of the current progress remaining (from 1 to 0). With
        ``target_kl``, it is where the learning rate starts; the default step, along the natural gradient with a ``target_kl``,
        does not use it.
    :param n_episodes: Number of complete episodes per update, over all environments (of all processes): environment ``i`` of
        ``n_envs`` gives ``(n_episodes + i) // n_envs`` of them. ``None``: 8, or one per environment if there are more.
    :param target_steps: Collect more than ``n_episodes`` if so many steps take more episodes: the same number from each
        environment. It goes by the mean lengths of the episodes of the last two updates, by the longer one, and is known
        before the first episode begins, which keeps the estimate unbiased. ``None``: 512 if ``n_episodes`` is not given,
        otherwise 0.
    :param max_episode_steps: Give up with an error on an episode that is longer than this: the environment has no time limit
        and does not end
    :param gamma: Discount factor
    :param gae_lambda: Factor for trade-off of bias vs variance for Generalized Advantage Estimator, with the learned baseline.
        1 is Monte Carlo. ``None``: 0.97 with ``baseline="value"`` and ``returns="reward_to_go"``, otherwise 1.
    :param returns: The return ``R_it``: ``"reward_to_go"`` (discounted rewards from step t on), ``"episode"`` (discounted
        rewards of the whole episode) or ``"mean_reward_to_go"`` (mean over the episode of its rewards-to-go, biased). See
        :mod:`sb3_reinforce.returns`.
    :param baseline: The baseline ``b_it``: ``None``, ``"mean"`` (mean return of the episodes; shrinks the gradient by 1 -
        1/N), ``"leave_one_out"`` (mean return of the other episodes), ``"timestep"`` (mean return of the other episodes at the
        same time, for the reward-to-go), ``"linear"`` (ridge regression on the other episodes), ``"greedy"`` (return of an
        episode of the likeliest actions with the same start, whose steps are not learned from) or ``"value"`` (a learned
        critic). See :mod:`sb3_reinforce.baselines`.
    :param normalize_advantage: Whether to normalize or not the advantage ``R - b``. If nothing but a fitted baseline tells
        the episodes of a batch apart, as all have the same return, or time limits have cut off all of them and the critic says
        what would have come, then ``target_kl`` gives a step that is as much shorter as the advantages are smaller than they
        have been so far
    :param reduction: ``"episode"``: sum over the steps of an episode, mean over episodes, as in the formula; ``"step"``: mean
        over all steps, as in A2C
    :param discount_states: Whether ``w_t`` is ``gamma^t``, the exact gradient of the discounted objective (Nota & Thomas,
        https://arxiv.org/abs/1906.07073), instead of 1
    :param time_limit: What the end of an episode means if a time limit cut it off: ``"terminal"`` (no reward comes after it),
        ``"bootstrap"`` (the critic says what would have come; needs ``baseline="value"``) or ``"discard"`` (the episode counts
        towards ``n_episodes``, but is not learned from). ``None``: ``"bootstrap"`` with ``baseline="value"`` and
        ``gamma`` below 1, otherwise ``"terminal"``. An episode that terminates on its last step has terminated.
    :param ent_coef: Entropy coefficient for the loss calculation, reduced over steps and episodes as the gradient is. It can
        be a function of the current progress remaining
    :param n_value_epochs: Number of passes of the critic over the batch, after the advantages are taken
    :param value_batch_size: Minibatch size of the critic, in steps
    :param value_learning_rate: Learning rate of the critic, it can be a function of the current progress remaining
    :param normalize_value: Whether the critic learns its targets less their running mean, over their running standard
        deviation
    :param max_grad_norm: The maximum value for the gradient clipping, ``None`` for no clipping
    :param target_kl: Limit the step by the KL divergence between the policy before and after it, measured on the batch: while
        it is over twice the target, the step is halved, and the learning rate follows the target from update to update. It can
        be a function of the current progress remaining (default: from 0.05 to 0.005). ``None``: no limit.
    :param natural_gradient: Whether to step along the natural gradient ``x = F^-1 g`` (Kakade, A natural policy gradient,
        2001), ``F`` being the Fisher information of the policy, a mean over the steps of the batch, instead of taking ``g`` to
        the optimizer of the policy. With ``target_kl``, the length of the step makes ``1/2 x^T (F + cg_damping I) x`` equal
        to it; without, the length is ``learning_rate``.
    :param cg_max_steps: Maximum number of steps of the conjugate gradient method that solves ``F x = g``
    :param cg_damping: Multiple of the identity that is added to ``F``
    :param group_size: Number of episodes that share a start, the same seed of the reset; ``n_episodes`` is a multiple of it.
        The other episodes, for ``"mean"``, ``"leave_one_out"`` and ``"timestep"``, are then those of the group. The seed also
        decides the later noise of the environment, which the group shares too. 1: every episode has a start of its own
    :param group_options: Function that gives the ``options`` of a group's resets for their seed
    :param use_masking: Whether to sample only actions that the environment calls valid, if it offers masks
        (:mod:`sb3_reinforce.masks`)
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE) instead of action noise exploration (default:
        False)
    :param sde_sample_freq: Sample a new noise matrix every n steps when using gSDE Default: -1 (only sample at the beginning
        of the rollout, and whenever an episode ends)
    :param rollout_buffer_class: Rollout buffer class to use, an ``EpisodeRolloutBuffer``. If ``None``, it will be
        automatically selected.
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer on creation.
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average the reported
        success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation. See
        :class:`~sb3_reinforce.policies.ReinforcePolicy`
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for debug
        messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run. Setting it to auto, the code will be run on the GPU
        if possible.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: If an argument is not one of those allowed, or does not go with another one
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": ReinforcePolicy,
        "CnnPolicy": ReinforceCnnPolicy,
        "MultiInputPolicy": ReinforceMultiInputPolicy,
        "MlpLstmPolicy": ReinforceLstmPolicy,
        "CnnLstmPolicy": ReinforceCnnLstmPolicy,
        "MultiInputLstmPolicy": ReinforceMultiInputLstmPolicy,
    }

    #: Share of the learning rate that the KL target has left; learned, and saved with the model
    _kl_learning_rate_factor: float = 1.0

    @explain_unknown_arguments(HINTS)
    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-2,
        n_episodes: int | None = None,
        target_steps: int | None = None,
        max_episode_steps: int = 100_000,
        gamma: float = 0.99,
        gae_lambda: float | None = None,
        returns: str = "reward_to_go",
        baseline: str | None = "value",
        normalize_advantage: bool = True,
        reduction: str = "episode",
        discount_states: bool = False,
        time_limit: str | None = None,
        ent_coef: float | Schedule = 0.0,
        n_value_epochs: int = 10,
        value_batch_size: int = 256,
        value_learning_rate: float | Schedule = 1e-3,
        normalize_value: bool = True,
        max_grad_norm: float | None = None,
        target_kl: float | Schedule | None = DEFAULT_TARGET_KL,
        natural_gradient: bool = True,
        cg_max_steps: int = 15,
        cg_damping: float = 0.01,
        group_size: int = 1,
        group_options: Callable[[int], dict[str, Any]] | None = None,
        use_masking: bool = True,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[EpisodeRolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_episodes=n_episodes,
            target_steps=target_steps,
            max_episode_steps=max_episode_steps,
            time_limit=time_limit,
            use_masking=use_masking,
            group_size=group_size,
            group_options=group_options,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        self.returns = returns
        self.baseline = baseline
        self.normalize_advantage = normalize_advantage
        self.reduction = reduction
        self.discount_states = discount_states
        self.n_value_epochs = n_value_epochs
        self.value_batch_size = value_batch_size
        self.value_learning_rate = value_learning_rate
        self.normalize_value = normalize_value
        self.target_kl = target_kl
        self.natural_gradient = natural_gradient
        self.cg_max_steps = cg_max_steps
        self.cg_damping = cg_damping
        # Learned, and saved with the model
        self._value_rms = RunningMeanStd()
        self._advantage_rms = RunningMeanStd(epsilon=0)
        self._watch = Watch()

        if _init_setup_model:
            self._setup_model()

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = to_schedule(self.learning_rate)

    def _maybe_recommend_cpu(self, mlp_class_name: str = "ReinforcePolicy") -> None:
        super()._maybe_recommend_cpu(mlp_class_name)

    def _setup_model(self) -> None:
        check_arguments(self)
        super()._setup_model()
        # Steps that go through the network at once, so that memory does not grow with the batch
        self._chunk_size = min(2**13, max(1, 2**22 // max(1, spaces.flatdim(self.observation_space))))
        self._critic: Critic | None = None

    @property
    def bootstraps(self) -> bool:
        """Whether the critic says what would have come after the time limit that cut an episode off."""
        return self.time_limit == "bootstrap" or (self.time_limit is None and self.baseline == "value" and self.gamma < 1)

    @property
    def plays_greedy(self) -> bool:
        """Whether each group has a greedy episode besides those that are learned from."""
        return self.baseline == "greedy"

    @property
    def critic(self) -> Critic:
        """The critic of the policy. A policy that was put in the place of another one gets a new optimizer and statistics."""
        if self._critic is not None and self._critic.policy is not self.policy:
            self._value_rms, self._advantage_rms = RunningMeanStd(), RunningMeanStd(epsilon=0)
            self._kl_learning_rate_factor, self._critic = 1.0, None
        if self._critic is None:
            learning_rate = to_schedule(self.value_learning_rate)(1)
            self._critic = Critic(self.policy, self._value_rms, learning_rate, self.normalize_value)
        return self._critic

    @property
    def value_optimizer(self) -> th.optim.Optimizer:
        """The optimizer of the critic. Every model has one, so that it can be loaded with another baseline."""
        return self.critic.optimizer

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_critic"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, tensors = super()._get_torch_save_params()
        return [*state_dicts, "value_optimizer"], tensors

    def train(self) -> None:
        """
        Update the policy by one step along the policy gradient of the collected episodes, and fit the critic if there is one.

        :raises ValueError: If an advantage, the critic's loss, the gradient or a product with the Fisher matrix is not finite;
            the model is then as it was
        """
        buffer, policy = self.rollout_buffer, batch_policy(self.policy)
        critic = self.critic if self.baseline == "value" else None
        n_needed = MIN_N_EPISODES.get(self.baseline, 1)
        if buffer.total_episodes < n_needed:
            warnings.warn(
                f"No update: {buffer.total_episodes} episodes are left to learn from, at least {n_needed} are needed. "
                "time_limit='discard' leaves out those that a time limit cut off; consider 'terminal' or 'bootstrap'"
            )
            return
        chunks = buffer.chunks(self._chunk_size, has_memory(self.policy))

        # Advantages, in eval mode (this affects batch norm / dropout) as in the rollout
        policy.set_training_mode(False)
        metrics = self._estimate_advantages(critic, chunks)

        # Critic, after the advantages are taken
        policy.set_training_mode(True)
        with critic.restored_on_error() if critic else nullcontext():
            if critic is not None:
                learning_rate = evaluate("value_learning_rate", self.value_learning_rate, self._current_progress_remaining)
                metrics["value_loss"] = critic.fit(buffer, self.n_value_epochs, self.value_batch_size, learning_rate)

            # Gradient
            count = buffer.total_episodes if self.reduction == "episode" else buffer.total_steps
            ent_coef = evaluate("ent_coef", self.ent_coef, self._current_progress_remaining)
            gradient = policy_gradient(
                policy, chunks, count, buffer.total_steps, ent_coef, self.max_grad_norm, buffer.first_half
            )
            metrics |= gradient.metrics
            if self.ent_coef:
                metrics["ent_coef"] = ent_coef

            # Step
            policy.set_training_mode(False)
            advantage_rms = self._advantage_rms.copy()
            advantage_rms.update_from_moments(np.zeros(()), np.square(metrics["advantage_std"]), buffer.total_steps)
            ratio = metrics["advantage_std"] / (math.sqrt(advantage_rms.var) or 1.0)
            metrics |= self._step(gradient, chunks, min(1.0, ratio) if self._rests_on_baseline(metrics) else 1.0)
            metrics["advantage_ratio"], self._advantage_rms = ratio, advantage_rms

        if rank() == 0:  # All processes have the same numbers
            self._watch.look(metrics, buffer.total_steps, not isinstance(self.action_space, spaces.Box))
        self._n_updates += 1
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, value in metrics.items():
            self.logger.record(f"train/{name}", value)

    def _estimate_advantages(self, critic: Critic | None, chunks: Chunks) -> dict[str, float]:
        """
        Fill in the ``advantages``, ``returns`` and ``targets`` of the rollout buffer.

        :param critic: The critic, if the baseline is one
        :param chunks: The batch in parts
        :return: Numbers to log
        :raises ValueError: If one of the arrays is not finite in single precision
        """
        buffer = self.rollout_buffer
        estimate = compute_advantages(
            buffer.rewards,
            buffer.lengths,
            self.gamma,
            returns=self.returns,
            baseline=self.baseline,
            values=critic.predict(chunks) if critic else None,
            last_values=critic.predict_last(buffer) if critic and self.bootstraps else None,
            gae_lambda=resolve_gae_lambda(self.gae_lambda, self.returns, self.baseline),
            observations=flat_observations(chunks, self.observation_space) if self.baseline == "linear" else None,
            groups=buffer.groups,
            n_groups=buffer.n_groups,
            greedy=(buffer.greedy_rewards, buffer.greedy_lengths, buffer.greedy_groups) if self.plays_greedy else None,
        )
        if self.group_size > 1:
            without_signal = count_without_signal(estimate, buffer.lengths, buffer.groups, buffer.n_groups)
            self.logger.record("rollout/groups_without_signal", without_signal)
        metrics = describe(estimate, buffer.lengths, self.baseline)
        discount = self.gamma if self.discount_states else 1.0
        factors = weights(estimate, buffer.lengths, buffer.total_steps, self.normalize_advantage, discount)
        buffer.advantages, buffer.returns, buffer.targets = to_single_precision(
            buffer.rewards,
            advantages=factors,
            returns=estimate.advantages + estimate.baseline,
            targets=estimate.targets,
        )
        return metrics

    def _rests_on_baseline(self, metrics: dict[str, float]) -> bool:
        """
        Find whether nothing but a fitted baseline tells the episodes of the batch apart: all have the same return, or time
        limits have cut off all of them, and the critic says what would have come. All processes that share a batch have to
        call this.

        :param metrics: Result of :meth:`_estimate_advantages`
        :return: Whether it is so, and advantages are normalized
        """
        buffer, is_fitted = self.rollout_buffer, self.baseline in ("linear", "value")
        have_ended = all_max(any(not episode.truncated for episode in buffer.episodes))
        are_equal = buffer.total_episodes > 1 and metrics["return_std"] <= ROUNDING * abs(metrics["return_mean"])
        return self.normalize_advantage and ((is_fitted and are_equal) or (self.bootstraps and not have_ended))

    def _step(self, gradient: PolicyGradient, chunks: Chunks, ratio: float) -> dict[str, float]:
        """
        Step along the gradient, no further than ``target_kl`` allows.

        :param gradient: Gradient of the loss
        :param chunks: The batch in parts
        :param ratio: How much shorter the step is than ``target_kl`` allows
        :return: Numbers to log: mean KL divergence from the policy before to the policy after the step, in nats; the
            learning rate of the optimizer, or the length of the step along the natural gradient; whether a step was made
        """
        policy, total_steps = batch_policy(self.policy), self.rollout_buffer.total_steps
        progress = self._current_progress_remaining
        target_kl = None if self.target_kl is None else evaluate("target_kl", self.target_kl, progress)
        length = self.lr_schedule(progress)
        if target_kl is not None:
            length *= ratio * self._kl_learning_rate_factor
        name = "step_length" if self.natural_gradient else "learning_rate"
        if gradient.is_zero:  # The momentum of older gradients is not to move a solved policy
            return {name: length, "approx_kl": 0.0}
        with PolicyStep(policy, gradient.parameters, self.policy.optimizer, chunks, total_steps) as step:
            if self.natural_gradient:
                product = fisher_vector_product(policy, gradient.parameters, chunks, total_steps, self.cg_damping)
                direction, curvature = natural_gradient(gradient.gradient, product, self.cg_max_steps)
                if target_kl is not None and curvature > 0:
                    length = ratio * math.sqrt(2 * target_kl / curvature)
                step.move(direction, length)
            else:
                step.optimize(gradient.gradient, length)
            if target_kl is None:
                try:
                    return {name: length, "approx_kl": step.kl()}
                except NotImplementedError:  # Nothing but the log asks for it
                    return {name: length, "approx_kl": math.nan}
            approx_kl, share = step.backtrack(2 * target_kl)
        if not self.natural_gradient:  # The divergence grows with the square of the step
            factor, aim = self._kl_learning_rate_factor, target_kl * ratio**2
            self._kl_learning_rate_factor = adapt_learning_rate(factor, approx_kl, aim, share)
        return {name: length, "approx_kl": approx_kl, "is_line_search_success": float(share > 0)}

    def learn(
        self: SelfREINFORCE,
        total_timesteps: int = 100_000,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str = "REINFORCE",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfREINFORCE:
        if reset_num_timesteps and not self.is_resuming:  # The schedules start again too, and the rewards can be others
            self._kl_learning_rate_factor, self._advantage_rms = 1.0, RunningMeanStd(epsilon=0)
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
