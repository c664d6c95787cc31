import math
import warnings
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule

from sb3_reinforce.advantages import compute_advantages, describe, to_single_precision, weights
from sb3_reinforce.baselines import BASELINES
from sb3_reinforce.batch_policy import batch_policy
from sb3_reinforce.buffers import Chunks, EpisodeRolloutBuffer
from sb3_reinforce.checks import check_choice, check_number, check_schedule, explain_unknown_arguments
from sb3_reinforce.critic import Critic
from sb3_reinforce.gradient import PolicyGradient, policy_gradient
from sb3_reinforce.line_search import PolicyStep, adapt_learning_rate
from sb3_reinforce.natural_gradient import fisher_vector_product, natural_gradient
from sb3_reinforce.policies import ReinforceCnnPolicy, ReinforceMultiInputPolicy, ReinforcePolicy
from sb3_reinforce.returns import RETURNS
from sb3_reinforce.rollout import EpisodicOnPolicyAlgorithm

SelfREINFORCE = TypeVar("SelfREINFORCE", bound="REINFORCE")

#: The arguments that are names, and the names they take.
CHOICES: dict[str, tuple[str | None, ...]] = {
    "returns": tuple(RETURNS),
    "baseline": (None, *BASELINES, "value"),
    "reduction": ("episode", "step"),
    "time_limit": ("terminal", "bootstrap", "discard"),
}

#: Long steps at first, short ones at the end, so that the final policy is not one long step away from a good one.
DEFAULT_TARGET_KL = LinearSchedule(0.3, 0.002, 1.0)

#: What takes the place of arguments of A2C and PPO.
HINTS = {
    "n_steps": "a batch is n_episodes whole episodes, and at least min_steps steps",
    "batch_size": "the policy takes one step per batch of n_episodes; the critic has value_batch_size",
    "n_epochs": "the policy takes one step per batch; the critic has n_value_epochs",
    "vf_coef": "the critic has an optimizer of its own, with value_learning_rate",
    "clip_range": "target_kl limits the step",
}


class REINFORCE(EpisodicOnPolicyAlgorithm):
    """
    REINFORCE (Monte-Carlo policy gradient)

    Every update takes ``N`` complete episodes of the current policy and makes one step along the gradient estimate

    ``g = 1/N sum_i sum_t w_t grad log pi(a_it | s_it) (R_it - b_it)``

    Papers: Williams, Simple statistical gradient-following algorithms for connectionist reinforcement learning,
    Machine Learning 8, 1992; Sutton & Barto, Reinforcement Learning: An Introduction, 2nd ed., sections 13.3 and 13.4.

    Log-probabilities are those of the sampled action; the environment gets it clipped to the bounds of its space.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, ...)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: The learning rate, it can be a function of the current progress remaining (from 1 to 0).
        With ``target_kl``, it is where the learning rate starts.
    :param n_episodes: Number of complete episodes per update, over all environments (of all processes): environment
        ``i`` of ``n_envs`` gives ``(n_episodes + i) // n_envs`` of them. ``None``: 8, or one per environment if there
        are more.
    :param min_steps: Collect further rounds of ``n_episodes`` until there are this many steps. The gradient
        estimate is then no longer exactly unbiased, as the number of episodes depends on their lengths.
    :param max_episode_steps: Give up with an error on an episode that is longer than this: the environment has no
        time limit and does not end
    :param gamma: Discount factor
    :param gae_lambda: Factor for trade-off of bias vs variance for Generalized Advantage Estimator, with the learned
        baseline. 1 is Monte Carlo.
    :param returns: The return ``R_it``: ``"reward_to_go"`` (discounted rewards from step t on), ``"episode"``
        (discounted rewards of the whole episode) or ``"mean_reward_to_go"`` (mean over the episode of its
        rewards-to-go, biased). See :mod:`sb3_reinforce.returns`.
    :param baseline: The baseline ``b_it``: ``None``, ``"mean"`` (mean return of the episodes; shrinks the gradient by
        1 - 1/N), ``"leave_one_out"`` (mean return of the other episodes), ``"timestep"`` (mean return of the other
        episodes at the same time, for the reward-to-go) or ``"value"`` (a learned critic). See :mod:`sb3_reinforce.baselines`.
    :param normalize_advantage: Whether to normalize or not the advantage ``R - b``
    :param reduction: ``"episode"``: sum over the steps of an episode, mean over episodes, as in the formula;
        ``"step"``: mean over all steps, as in A2C
    :param discount_states: Whether ``w_t`` is ``gamma^t``, the exact gradient of the discounted objective (Nota & Thomas,
        https://arxiv.org/abs/1906.07073), instead of 1
    :param time_limit: What the end of an episode means if a time limit cut it off: ``"terminal"`` (no reward comes
        after it), ``"bootstrap"`` (the critic says what would have come; needs ``baseline="value"``) or ``"discard"``
        (the episode counts towards ``n_episodes``, but is not learned from). An episode that terminates on its last
        step has terminated.
    :param ent_coef: Entropy coefficient for the loss calculation, reduced over steps and episodes as the gradient is
    :param n_value_epochs: Number of passes of the critic over the batch, after the advantages are taken
    :param value_batch_size: Minibatch size of the critic, in steps
    :param value_learning_rate: Learning rate of the critic, it can be a function of the current progress remaining
    :param normalize_value: Whether the critic learns its targets less their running mean, over their running standard
        deviation
    :param max_grad_norm: The maximum value for the gradient clipping, ``None`` for no clipping
    :param target_kl: Limit the step by the KL divergence between the policy before and after it, measured on the batch:
        while it is over twice the target, the step is halved, and the learning rate follows the target from update to
        update. It can be a function of the current progress remaining (default: from 0.3 to 0.002). ``None``: no limit.
    :param natural_gradient: Whether to step along the natural gradient ``x = F^-1 g`` (Kakade, A natural policy gradient,
        2001), ``F`` being the Fisher information of the policy, a mean over the steps of the batch, instead of taking ``g`` to
        the optimizer of the policy. With ``target_kl``, the length of the step makes it the divergence ``1/2 x^T F x``;
        without, it is ``learning_rate``.
    :param cg_max_steps: Maximum number of steps of the conjugate gradient method that solves ``F x = g``
    :param cg_damping: Multiple of the identity that is added to ``F``
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE)
        instead of action noise exploration (default: False)
    :param sde_sample_freq: Sample a new noise matrix every n steps when using gSDE
        Default: -1 (only sample at the beginning of the rollout, and whenever an episode ends)
    :param rollout_buffer_class: Rollout buffer class to use, an ``EpisodeRolloutBuffer``.
        If ``None``, it will be automatically selected.
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer on creation.
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation. See
        :class:`~sb3_reinforce.policies.ReinforcePolicy`
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
        Setting it to auto, the code will be run on the GPU if possible.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: If an argument is not one of those allowed, or does not go with another one
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": ReinforcePolicy,
        "CnnPolicy": ReinforceCnnPolicy,
        "MultiInputPolicy": ReinforceMultiInputPolicy,
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
        min_steps: int = 0,
        max_episode_steps: int = 100_000,
        gamma: float = 0.99,
        gae_lambda: float = 1.0,
        returns: str = "reward_to_go",
        baseline: str | None = "timestep",
        normalize_advantage: bool = True,
        reduction: str = "episode",
        discount_states: bool = False,
        time_limit: str = "terminal",
        ent_coef: float = 0.0,
        n_value_epochs: int = 5,
        value_batch_size: int = 256,
        value_learning_rate: float | Schedule = 1e-3,
        normalize_value: bool = True,
        max_grad_norm: float | None = None,
        target_kl: float | Schedule | None = DEFAULT_TARGET_KL,
        natural_gradient: bool = False,
        cg_max_steps: int = 15,
        cg_damping: float = 0.1,
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
            min_steps=min_steps,
            max_episode_steps=max_episode_steps,
            time_limit=time_limit,
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

        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        """
        Check the arguments, each on its own and together.

        :raises ValueError: If an argument is not one of those allowed, or does not go with another one
        """
        for name, allowed in CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        for name in ("gamma", "gae_lambda"):
            check_number(name, getattr(self, name), 0, 1)
        for name in ("max_episode_steps", "n_value_epochs", "value_batch_size", "cg_max_steps"):
            check_number(name, getattr(self, name), 1, integer=True)
        check_number("min_steps", self.min_steps, 0, integer=True)
        check_number("cg_damping", self.cg_damping, 0)
        check_number("ent_coef", self.ent_coef, -math.inf)
        for name in ("learning_rate", "value_learning_rate"):
            check_schedule(name, getattr(self, name))
        check_schedule("target_kl", self.target_kl, or_none=True)
        if self.max_grad_norm is not None:
            check_number("max_grad_norm", self.max_grad_norm, 0, or_else="None")
        if self.n_episodes is not None:
            name = f"With baseline={self.baseline!r}, n_episodes"
            check_number(name, self.n_episodes, self._min_n_episodes, integer=True, or_else="None")
        if self.time_limit == "bootstrap" and self.baseline != "value":
            raise ValueError(f"time_limit='bootstrap' needs the critic, baseline='value', not {self.baseline!r}")
        if self.gae_lambda < 1 and (self.baseline != "value" or self.returns != "reward_to_go"):
            raise ValueError(
                f"gae_lambda={self.gae_lambda} < 1 needs baseline='value' and returns='reward_to_go', "
                f"not {self.baseline!r} and {self.returns!r}"
            )
        if self.returns != "reward_to_go" and self.baseline in ("timestep", "value"):
            warnings.warn(
                f"baseline={self.baseline!r} estimates the reward-to-go, not returns={self.returns!r}, which is the same at "
                "all times of an episode: baseline='leave_one_out' goes with it"
            )
        self._check_spaces_and_buffer()

    def _check_spaces_and_buffer(self) -> None:
        buffer_class = self.rollout_buffer_class
        if buffer_class is not None and not (
            isinstance(buffer_class, type) and issubclass(buffer_class, EpisodeRolloutBuffer)
        ):
            name = getattr(buffer_class, "__name__", repr(buffer_class))
            if name in ("RolloutBuffer", "DictRolloutBuffer"):
                other = "PPO" if hasattr(self, "clip_range") else "A2C, TRPO or another algorithm"
                raise ValueError(f"rollout_buffer_class={name}: this is a model of {other}, not of REINFORCE")
            raise ValueError(f"rollout_buffer_class={name} must be an EpisodeRolloutBuffer")
        if self.env is not None:
            self._check_n_envs(self.env.num_envs)
        space = getattr(self, "action_space", None)  # Not without an environment
        if isinstance(space, spaces.MultiBinary | spaces.MultiDiscrete) and len(space.shape) > 1:
            raise ValueError(f"{space} has more than one dimension, which is not supported: flatten it")
        if np.any(getattr(space, "start", 0) != 0):
            raise ValueError(
                f"The actions of {space} do not start at 0, which is not supported: SB3's policies sample numbers from 0 on. "
                "gymnasium.wrappers.TransformAction(env, lambda action: action + start, space from 0 on) shifts them"
            )

    @property
    def _min_n_episodes(self) -> int:
        return 2 if self.baseline in ("leave_one_out", "timestep") else 1

    def _maybe_recommend_cpu(self, mlp_class_name: str = "ReinforcePolicy") -> None:
        super()._maybe_recommend_cpu(mlp_class_name)

    def _setup_model(self) -> None:
        self._check_arguments()
        super()._setup_model()
        # Steps that go through the network at once, so that memory does not grow with the batch
        self._chunk_size = min(2**13, max(1, 2**22 // max(1, spaces.flatdim(self.observation_space))))
        self._critic = self._make_critic()

    def _make_critic(self) -> Critic:
        # Made for every baseline, so that a model can be loaded with another one
        learning_rate = FloatSchedule(self.value_learning_rate)(1)
        return Critic(self.policy, self._value_rms, learning_rate, self.normalize_value)

    @property
    def critic(self) -> Critic:
        """The critic of the policy. A policy that was put in the place of another one gets a new optimizer and statistics."""
        if self._critic.policy is not self.policy:
            self._value_rms = RunningMeanStd()
            self._kl_learning_rate_factor = 1.0
            self._critic = self._make_critic()
        return self._critic

    @property
    def value_optimizer(self) -> th.optim.Optimizer:
        """The optimizer of the critic."""
        return self.critic.optimizer

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_critic"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, tensors = super()._get_torch_save_params()
        return [*state_dicts, "value_optimizer"], tensors

    def _scheduled(self, name: str) -> float:
        """
        Evaluate an argument that can be a schedule.

        :param name: Name of the argument
        :return: Its value at this time of the training
        :raises ValueError: If it is negative or not finite
        """
        value = FloatSchedule(getattr(self, name))(self._current_progress_remaining)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value} must be in [0, inf) (progress {self._current_progress_remaining:g})")
        return value

    def train(self) -> None:
        """
        Update the policy by one step along the policy gradient of the collected episodes, and fit the critic if there is one.

        :raises ValueError: If an advantage, the critic's loss or the gradient is not finite; the parameters of the policy are
            then those from before
        """
        buffer, policy, critic = self.rollout_buffer, batch_policy(self.policy), self.critic
        if buffer.total_episodes < self._min_n_episodes:
            warnings.warn(
                f"No update: {buffer.total_episodes} episodes are left to learn from, at least {self._min_n_episodes} are "
                "needed. time_limit='discard' leaves out those that a time limit cut off; consider 'terminal' or 'bootstrap'"
            )
            return
        chunks = buffer.chunks(self._chunk_size)

        # Advantages, in eval mode (this affects batch norm / dropout) as in the rollout
        policy.set_training_mode(False)
        metrics = self._estimate_advantages(critic, chunks)

        # Critic, after the advantages are taken
        policy.set_training_mode(True)
        if self.baseline == "value":
            learning_rate = self._scheduled("value_learning_rate")
            metrics["value_loss"] = critic.fit(buffer, self.n_value_epochs, self.value_batch_size, learning_rate)

        # Gradient
        count = buffer.total_episodes if self.reduction == "episode" else buffer.total_steps
        gradient = policy_gradient(policy, chunks, count, buffer.total_steps, self.ent_coef, self.max_grad_norm)
        metrics |= gradient.metrics

        # Step
        policy.set_training_mode(False)
        metrics |= self._step(gradient, chunks)

        self._n_updates += 1
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, value in metrics.items():
            self.logger.record(f"train/{name}", value)

    def _estimate_advantages(self, critic: Critic, chunks: Chunks) -> dict[str, float]:
        """
        Fill in the ``advantages``, ``returns`` and ``targets`` of the rollout buffer.

        :param critic: The critic
        :param chunks: The batch in parts
        :return: Numbers to log
        :raises ValueError: If one of them is not finite in single precision
        """
        buffer = self.rollout_buffer
        estimate = compute_advantages(
            buffer.rewards,
            buffer.lengths,
            self.gamma,
            returns=self.returns,
            baseline=self.baseline,
            values=critic.predict(chunks) if self.baseline == "value" else None,
            last_values=critic.predict_last(buffer) if self.time_limit == "bootstrap" else None,
            gae_lambda=self.gae_lambda,
        )
        metrics = describe(estimate, buffer.lengths, self.baseline)
        discount = self.gamma if self.discount_states else 1.0
        factors = weights(estimate, buffer.lengths, buffer.total_steps, self.normalize_advantage, discount)
        buffer.advantages, buffer.returns, buffer.targets = to_single_precision(
            {"the advantages": factors, "the returns": estimate.returns, "the critic's targets": estimate.targets},
            buffer.rewards,
        )
        return metrics

    def _step(self, gradient: PolicyGradient, chunks: Chunks) -> dict[str, float]:
        """
        Step along the gradient, no further than ``target_kl`` allows.

        :param gradient: Gradient of the loss
        :param chunks: The batch in parts
        :return: Numbers to log: mean KL divergence from the policy before to the policy after the step, in nats, and the
            learning rate of the optimizer, or the length of the step along the natural gradient
        """
        policy, total_steps = batch_policy(self.policy), self.rollout_buffer.total_steps
        target_kl = None if self.target_kl is None else self._scheduled("target_kl")
        length = self.lr_schedule(self._current_progress_remaining)
        if target_kl is not None and not self.natural_gradient:  # Whose step has its own length each time
            length *= self._kl_learning_rate_factor
        name = "step_length" if self.natural_gradient else "learning_rate"
        if gradient.is_zero:  # The momentum of older gradients is not to move a solved policy
            return {name: length, "approx_kl": 0.0}
        with PolicyStep(policy, gradient.parameters, self.policy.optimizer, chunks, total_steps) as step:
            if self.natural_gradient:
                product = fisher_vector_product(policy, gradient.parameters, chunks, total_steps, self.cg_damping)
                direction, curvature = natural_gradient(gradient.gradient, product, self.cg_max_steps)
                if target_kl is not None and curvature > 0:
                    length = math.sqrt(2 * target_kl / curvature)
                step.move(direction, length)
            else:
                step.optimize(gradient.gradient, length)
            if target_kl is None:
                return {name: length, "approx_kl": step.kl()}
            approx_kl, share = step.backtrack(2 * target_kl)
        if not self.natural_gradient:
            self._kl_learning_rate_factor = adapt_learning_rate(self._kl_learning_rate_factor, approx_kl, target_kl, share)
        return {name: length, "approx_kl": approx_kl}

    def learn(
        self: SelfREINFORCE,
        total_timesteps: int = 100_000,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str = "REINFORCE",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfREINFORCE:
        if reset_num_timesteps and not self.is_resuming:  # The schedules start again too
            self._kl_learning_rate_factor = 1.0
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )
