import io
import math
import warnings
from collections.abc import Iterator
from copy import copy, deepcopy
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import Distribution, kl_divergence
from stable_baselines3.common.logger import configure
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, PyTorchObs, Schedule
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule, update_learning_rate
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from sb3_reinforce import distributed
from sb3_reinforce.baselines import BASELINES, drop_rounding
from sb3_reinforce.buffers import EpisodeRolloutBuffer
from sb3_reinforce.checkpoint import load_latest
from sb3_reinforce.checks import check_number
from sb3_reinforce.policies import ReinforceCnnPolicy, ReinforceMultiInputPolicy, ReinforcePolicy
from sb3_reinforce.returns import RETURNS, episode_starts, generalized_advantage, timesteps
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

#: A step that is still too long after so many halvings is not made at all.
MAX_HALVINGS = 20

#: How far the KL target can take the learning rate from the given one.
LEARNING_RATE_FACTORS = (1e-6, 1e3)


def set_values(parameters: list[th.nn.Parameter], values: list[th.Tensor]) -> None:
    """
    :param parameters: Parameters to change, in place
    :param values: Their new values
    """
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)


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
        # Both are learned, and saved with the model
        self._kl_learning_rate_factor = 1.0
        self._value_rms = RunningMeanStd()

        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, allowed))}")
        for name in ("gamma", "gae_lambda"):
            check_number(name, getattr(self, name), 0, 1)
        for name in ("n_value_epochs", "value_batch_size", "cg_max_steps"):
            check_number(name, getattr(self, name), 1, integer=True)
        check_number("cg_damping", self.cg_damping, 0)
        schedule = "a function of the progress remaining"
        for name, or_else in (
            ("learning_rate", schedule),
            ("value_learning_rate", schedule),
            ("target_kl", f"{schedule}, or None"),
        ):
            value = getattr(self, name)
            if not callable(value) and not (name == "target_kl" and value is None):
                check_number(name, value, 0, or_else=or_else)
        check_number("ent_coef", self.ent_coef, -math.inf)
        if self.max_grad_norm is not None:
            check_number("max_grad_norm", self.max_grad_norm, 0, or_else="None")
        if self.n_episodes is not None:
            check_number(
                f"With baseline={self.baseline!r}, n_episodes",
                self.n_episodes,
                self._min_n_episodes,
                integer=True,
                or_else="None",
            )
        if self.time_limit == "bootstrap" and self.baseline != "value":
            raise ValueError(f"time_limit='bootstrap' needs the critic, baseline='value', not {self.baseline!r}")
        if self.gae_lambda < 1 and (self.baseline != "value" or self.returns != "reward_to_go"):
            raise ValueError(
                f"gae_lambda={self.gae_lambda} < 1 needs baseline='value' and returns='reward_to_go', "
                f"not {self.baseline!r} and {self.returns!r}"
            )

    @property
    def _min_n_episodes(self) -> int:
        return 2 if self.baseline in ("leave_one_out", "timestep") else 1

    def _maybe_recommend_cpu(self, mlp_class_name: str = "ReinforcePolicy") -> None:
        super()._maybe_recommend_cpu(mlp_class_name)

    def _setup_model(self) -> None:
        super()._setup_model()
        # Steps that go through the network at once, so that memory does not grow with the batch
        self._chunk_size = min(2**13, max(1, 2**22 // max(1, spaces.flatdim(self.observation_space))))
        # The critic's own parameters: those that it shares with the actor are left to the policy gradient
        critic = th.nn.ModuleList([self.policy.value_net, self.policy.mlp_extractor.value_net])
        if not self.policy.share_features_extractor:
            critic.append(self.policy.vf_features_extractor)
        # Made for every baseline, so that a model can be loaded with another one
        self.value_optimizer = self.policy.optimizer_class(
            critic.parameters(),
            lr=FloatSchedule(self.value_learning_rate)(1),  # type: ignore[call-arg]
            **self.policy.optimizer_kwargs,
        )

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, tensors = super()._get_torch_save_params()
        return [*state_dicts, "value_optimizer"], tensors

    def train(self) -> None:
        """
        Take the policy gradient of the collected episodes, fit the critic if there is one, then make the step.

        :raises ValueError: If an advantage, the gradient or the critic's loss is not finite; the parameters of the
            policy are then those from before
        """
        if self.rollout_buffer.total_episodes < self._min_n_episodes:
            warnings.warn(
                f"No update: {self.rollout_buffer.total_episodes} episodes are left to learn from, at least "
                f"{self._min_n_episodes} are needed. time_limit='discard' leaves out those that a time limit cut off; "
                "consider 'terminal' or 'bootstrap'"
            )
            return
        # Eval mode (this affects batch norm / dropout), as in the rollout
        self.policy.set_training_mode(False)
        self._compute_advantages()

        self.policy.set_training_mode(True)
        self._compute_gradient()
        if self.baseline == "value":
            # What it shares with the actor is not to change, not even the statistics of batch norm
            self.policy.features_extractor.train(not self.policy.share_features_extractor)
            self.logger.record("train/value_loss", self._fit_value())

        self.policy.set_training_mode(False)
        learning_rate = self.lr_schedule(self._current_progress_remaining)
        if self.natural_gradient:  # The optimizer does not make this step
            learning_rate = self._precondition(learning_rate)
        else:
            if self.target_kl is not None:
                learning_rate *= self._kl_learning_rate_factor
            update_learning_rate(self.policy.optimizer, learning_rate)
        approx_kl = self._step(learning_rate)

        self._n_updates += 1
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/learning_rate", learning_rate)
        self.logger.record("train/approx_kl", approx_kl)

    def _compute_advantages(self) -> None:
        """
        Fill in the ``advantages`` and the ``returns`` (targets of the critic) of the rollout buffer.

        :raises ValueError: If one of them is not finite in single precision
        """
        buffer = self.rollout_buffer
        rewards, lengths = buffer.rewards, buffer.lengths
        if self.baseline == "value":
            chunks = [self._predict_values(batch.observations) for batch in buffer.get(self._chunk_size)]
            values = np.concatenate([np.zeros(0), *chunks])  # Another process can have all episodes that are left
            last_values = self._last_values()
            returns = RETURNS[self.returns](rewards, lengths, self.gamma, last_values)
            targets = values + generalized_advantage(rewards, values, lengths, self.gamma, self.gae_lambda, last_values)
            baseline = values
        else:
            returns = targets = RETURNS[self.returns](rewards, lengths, self.gamma)
            baseline = BASELINES[self.baseline](returns, lengths) if self.baseline else np.zeros_like(returns)
        # With the critic and lambda < 1, the lambda-return takes the place of the Monte-Carlo return
        advantages = (targets if self.gae_lambda < 1 else returns) - baseline
        return_sum = distributed.all_sum(returns[episode_starts(lengths)].sum())
        self.logger.record("train/return_mean", float(return_sum) / buffer.total_episodes)
        mean, var = distributed.mean_and_var(advantages)
        self.logger.record("train/advantage_std", math.sqrt(var))
        if self.baseline is not None:
            _, target_var = distributed.mean_and_var(targets)
            _, error_var = distributed.mean_and_var(targets - baseline)
            self.logger.record("train/explained_variance", 1 - error_var / target_var if target_var else math.nan)
        del baseline  # Large batches: from here on in place
        normalize = self.normalize_advantage and buffer.total_steps > 1
        if normalize:
            advantages -= mean
        drop_rounding(advantages, returns)
        if normalize:
            _, var = distributed.mean_and_var(advantages)
            advantages /= math.sqrt(var * buffer.total_steps / (buffer.total_steps - 1)) + 1e-8
        if self.discount_states:
            advantages *= self.gamma ** timesteps(lengths)
        with np.errstate(over="ignore", invalid="ignore"):
            buffer.advantages = advantages.astype(np.float32)
            buffer.returns = targets.astype(np.float32)
        is_finite = np.isfinite(buffer.advantages).all() and np.isfinite(buffer.returns).all()
        if distributed.all_max(not is_finite):
            largest = np.abs(rewards).max(initial=0)
            raise ValueError(
                f"A return or an advantage is not finite in single precision (largest reward {largest}): "
                "no update was made. Scale the rewards down, for example with VecNormalize, or look at the critic's values"
            )

    def _last_values(self) -> np.ndarray:
        """
        :return: Value of the observation after the last step of each episode, zero if none is wanted,
            shape ``(n_episodes,)``
        """
        last_values = np.zeros(self.rollout_buffer.n_episodes)
        for i, episode in enumerate(self.rollout_buffer.episodes):
            if episode.terminal_observation is not None:
                observation, _ = self.policy.obs_to_tensor(episode.terminal_observation)
                last_values[i] = self._predict_values(observation)[0]
        return last_values

    def _predict_values(self, observations: PyTorchObs) -> np.ndarray:
        """
        :param observations: Observations, shape ``(n_steps, *obs_shape)``
        :return: The critic's estimate in the unit of the returns, shape ``(n_steps,)``
        """
        with th.no_grad():
            values = self.policy.predict_values(observations).flatten().cpu().numpy().astype(np.float64)
        mean, std = self._value_scale(self._value_rms)
        return mean + std * values

    def _value_scale(self, value_rms: RunningMeanStd) -> tuple[float, float]:
        """
        :param value_rms: Statistics of the targets of the critic
        :return: What to add to, and to multiply the output of the critic with, in the unit of the returns
        """
        if not self.normalize_value:
            return 0.0, 1.0
        return float(value_rms.mean), float(np.sqrt(value_rms.var + 1e-8))

    def _compute_gradient(self) -> None:
        """
        Leave the gradient of the loss in the parameters of the policy.

        :raises ValueError: If it is not finite; nothing is left in the parameters then
        """
        buffer = self.rollout_buffer
        count = buffer.total_episodes if self.reduction == "episode" else buffer.total_steps
        policy_loss_sum = entropy_loss_sum = stddev_sum = 0.0
        self.policy.optimizer.zero_grad()
        for batch in buffer.get(self._chunk_size):
            # Distributions of vectors want floats, the one of integers wants those
            actions = batch.actions.flatten() if isinstance(self.action_space, spaces.Discrete) else batch.actions.float()
            distribution = self.policy.get_distribution(batch.observations)
            log_prob = distribution.log_prob(actions)
            entropy = distribution.entropy()
            policy_loss = -(batch.advantages * log_prob).sum()
            # Approximate entropy when no analytical form
            entropy_loss = -(-log_prob if entropy is None else entropy).sum()
            loss = policy_loss + self.ent_coef * entropy_loss if self.ent_coef else policy_loss
            (loss / count).backward()
            policy_loss_sum += policy_loss.item()
            entropy_loss_sum += entropy_loss.item()
            if isinstance(self.action_space, spaces.Box):
                stddev_sum += distribution.distribution.stddev.sum().item()  # type: ignore[union-attr]
        distributed.all_sum_gradients(list(self.policy.parameters()))
        sums = distributed.all_sum([policy_loss_sum, entropy_loss_sum, stddev_sum])
        policy_loss_sum, entropy_loss_sum, stddev_sum = sums.tolist()
        parameters = [parameter for parameter in self.policy.parameters() if parameter.grad is not None]
        total_norm = th.nn.utils.get_total_norm([parameter.grad for parameter in parameters])  # type: ignore[misc]
        if self.max_grad_norm is not None:
            th.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, total_norm)
        grad_norm = total_norm.item()
        if not math.isfinite(grad_norm):
            self.policy.optimizer.zero_grad()
            raise ValueError(
                f"The policy gradient is not finite (norm {grad_norm}, policy_loss {policy_loss_sum / count}): no step was "
                "made. Rewards that are too large, or a standard deviation near zero, are the usual reasons"
            )
        self.logger.record("train/policy_loss", policy_loss_sum / count)
        self.logger.record("train/entropy_loss", entropy_loss_sum / buffer.total_steps)
        self.logger.record("train/grad_norm", grad_norm)
        if isinstance(self.action_space, spaces.Box):
            self.logger.record("train/std", stddev_sum / (buffer.total_steps * buffer.action_dim))

    def _precondition(self, learning_rate: float) -> float:
        """
        Put the natural gradient ``x = F^-1 g`` in the place of the gradient ``g``.

        A step ``a x`` has the divergence ``a^2 / 2 x^T F x = a^2 / 2 g^T x``, to leading order. ``F`` is never made: conjugate
        gradients take products ``F v``, with the Hessian of the KL divergence (Schulman et al., Trust region policy
        optimization, 2015, appendix C).

        :param learning_rate: The length of the step without ``target_kl``
        :return: The length of the step
        """
        # Imported here for the time that it takes
        from scipy.sparse.linalg import LinearOperator, cg

        parameters = [parameter for parameter in self.policy.parameters() if parameter.grad is not None]
        gradient = parameters_to_vector([parameter.grad for parameter in parameters])  # type: ignore[misc]

        def kl_gradients() -> Iterator[th.Tensor]:
            for batch in self.rollout_buffer.get(self._chunk_size):
                with th.no_grad():
                    # The policy has a single distribution object, which the next call changes
                    fixed = copy(self.policy.get_distribution(batch.observations))
                kl = kl_divergence(fixed, self.policy.get_distribution(batch.observations)).sum()
                yield parameters_to_vector(th.autograd.grad(kl, parameters, create_graph=True))

        # A single chunk keeps its graph from one product to the next
        kept = list(kl_gradients()) if self.rollout_buffer.n_steps <= self._chunk_size else None

        def fisher_vector_product(vector: np.ndarray) -> np.ndarray:
            product = np.zeros_like(vector)
            direction = th.as_tensor(vector).to(gradient)
            for kl_gradient in kl_gradients() if kept is None else kept:
                row = th.autograd.grad(kl_gradient @ direction, parameters, retain_graph=kept is not None)
                product += parameters_to_vector(row).cpu().numpy()
            return distributed.all_sum(product) / self.rollout_buffer.total_steps + self.cg_damping * vector

        b = gradient.cpu().numpy().astype(np.float64)
        operator = LinearOperator((len(b), len(b)), fisher_vector_product, dtype=b.dtype)
        x, _ = cg(operator, b, maxiter=self.cg_max_steps)
        parts = th.as_tensor(x).to(gradient).split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        curvature = b @ x
        if self.target_kl is None or not curvature > 0:
            return learning_rate
        return math.sqrt(2 * self._current_target_kl() / curvature)

    def _current_target_kl(self) -> float:
        """
        :return: The divergence of a step, in nats, at this time of the training
        :raises ValueError: If it is negative or not a number
        """
        target_kl = FloatSchedule(self.target_kl)(self._current_progress_remaining)  # type: ignore[arg-type]
        if not target_kl >= 0:
            raise ValueError(f"target_kl={target_kl} must be in [0, inf] (progress {self._current_progress_remaining:g})")
        return target_kl

    def _step(self, learning_rate: float) -> float:
        """
        Step along the gradient, no further than ``target_kl`` allows.

        :param learning_rate: The learning rate
        :return: Mean KL divergence from the policy before to the policy after the step, in nats
        """
        parameters = [parameter for parameter in self.policy.parameters() if parameter.grad is not None]
        if not any(parameter.grad.any() for parameter in parameters):  # type: ignore[union-attr]
            return 0.0  # Nothing to learn: the momentum of older gradients is not to move a solved policy
        before = [parameter.detach().clone() for parameter in parameters]
        try:
            return self._limited_step(parameters, before, learning_rate)
        except BaseException:  # Ctrl-C as well, after which RL Zoo saves the model
            set_values(parameters, before)
            raise

    def _limited_step(self, parameters: list[th.nn.Parameter], before: list[th.Tensor], learning_rate: float) -> float:
        """
        :param parameters: Parameters that the step changes
        :param before: Their values before the step
        :param learning_rate: The learning rate
        :return: As :meth:`_step`
        """
        old = None
        if 0 < self.rollout_buffer.n_steps <= self._chunk_size:
            with th.no_grad():
                # The policy has a single distribution object, which the next call changes
                old = copy(self.policy.get_distribution(next(self.rollout_buffer.get()).observations))
        if self.natural_gradient:
            for parameter in parameters:
                parameter.data.sub_(learning_rate * parameter.grad)  # type: ignore[operator]
        else:
            self.policy.optimizer.step()
        approx_kl = self._approx_kl(parameters, before, old)
        if self.target_kl is None:
            return approx_kl

        target_kl = self._current_target_kl()
        n_halvings = 0
        while not approx_kl <= 2 * target_kl and n_halvings < MAX_HALVINGS:  # NaN is too far as well
            for parameter, start in zip(parameters, before, strict=True):
                parameter.data.lerp_(start, 0.5)
            n_halvings += 1
            approx_kl = self._approx_kl(parameters, before, old)
        if 0 < target_kl and approx_kl <= 2 * target_kl:
            # The divergence grows with the square of the step
            factor = 0.5**n_halvings * np.clip(math.sqrt(target_kl / max(approx_kl, 1e-12)), 0.5, 1.5)
        else:
            factor = 0.5
            approx_kl = 0.0
            set_values(parameters, before)
        if not self.natural_gradient:  # Whose step has its own length each time
            self._kl_learning_rate_factor = float(np.clip(factor * self._kl_learning_rate_factor, *LEARNING_RATE_FACTORS))
        return approx_kl

    def _approx_kl(
        self, parameters: list[th.nn.Parameter], before: list[th.Tensor], old_distribution: Distribution | None
    ) -> float:
        """
        :param parameters: Parameters that the step has changed
        :param before: Their values before the step
        :param old_distribution: The policy before the step on the batch; ``None``: it is computed chunk by chunk, as to
            keep it would take memory for the whole batch
        :return: Mean over the batch of ``KL(old || new)``, in nats; infinite if the new parameters make no distribution
        """
        after = [] if old_distribution else [parameter.detach().clone() for parameter in parameters]
        total = 0.0
        try:
            with th.no_grad():
                for batch in self.rollout_buffer.get(self._chunk_size):
                    old = old_distribution
                    if old is None:
                        set_values(parameters, before)
                        old = copy(self.policy.get_distribution(batch.observations))
                        set_values(parameters, after)
                    total += kl_divergence(old, self.policy.get_distribution(batch.observations)).sum().item()
        except ValueError:  # PyTorch's word for parameters that are not those of a distribution
            total = math.inf
        return float(distributed.all_sum(total)) / self.rollout_buffer.total_steps

    def _fit_value(self) -> float:
        """
        Fit the critic to the returns of the batch.

        :return: Mean squared error of the last pass, in the squared unit of the returns
        :raises ValueError: If it is not finite; the parameters of the critic are then those from before
        """
        value_rms = self._value_rms.copy()
        target_mean, target_var = distributed.mean_and_var(self.rollout_buffer.returns.astype(np.float64))
        value_rms.update_from_moments(target_mean, target_var, self.rollout_buffer.total_steps)  # type: ignore[arg-type]
        mean, std = self._value_scale(value_rms)
        parameters = self.value_optimizer.param_groups[0]["params"]
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer_before = deepcopy(self.value_optimizer.state_dict())
        update_learning_rate(self.value_optimizer, FloatSchedule(self.value_learning_rate)(self._current_progress_remaining))
        for _ in range(self.n_value_epochs):
            losses, sizes = [], []
            for batch, batch_size in self.rollout_buffer.get_minibatches(self.value_batch_size):
                values = self.policy.predict_values(batch.observations).flatten()
                loss = F.mse_loss(values, (batch.returns - mean) / std, reduction="sum") / batch_size
                self.value_optimizer.zero_grad()
                # The features that it shares with the actor get no gradient
                loss.backward(inputs=parameters)
                sizes.append(batch_size)
                losses.append(distributed.all_sum_gradients(parameters, loss.item()))
                if not math.isfinite(losses[-1]):
                    self.value_optimizer.zero_grad()
                    set_values(parameters, before)
                    self.value_optimizer.load_state_dict(optimizer_before)
                    raise ValueError(f"The loss of the critic is not finite ({losses[-1]}): it was not changed")
                self.value_optimizer.step()
        # The optimizer of the policy, which holds these parameters too, is to leave them alone
        self.value_optimizer.zero_grad()
        self._value_rms = value_rms
        return float(np.average(losses, weights=sizes)) * std**2

    @classmethod
    def resume(
        cls: type[SelfREINFORCE], path: str | Path, env: GymEnv | None = None, device: th.device | str | None = None
    ) -> SelfREINFORCE:
        """
        Go on with a run of which a :class:`~sb3_reinforce.checkpoint.TrainingStateCallback` has saved the state:
        ``REINFORCE.resume(path, env).learn(total_timesteps, callback)``, with an environment, a number of time steps (of the
        whole run) and callbacks like those of the run, ends as the run would have.

        Several processes all have to call it, and to be as many as before.

        The file holds a model in SB3's format, which is unpickled: take it only from those whom you trust.

        :param path: A training state, or a folder of them: the latest that is sound
        :param env: The environment to learn from
        :param device: Device on which the code should run, ``None`` for the same kind as before
        :return: The model
        :raises ValueError: If there is no sound training state
        """
        state, model = load_latest(Path(path))
        resumed = cls.load(io.BytesIO(model), env=env, device=device or state["device"])
        resumed._state_to_restore = state
        return resumed

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_state_to_restore"]

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        state = self._state_to_restore
        if state is None:
            return super()._setup_learn(*args, **kwargs)
        has_logger = self._custom_logger
        if self.tensorboard_log is not None and state["log_dir"] and not has_logger:
            self.set_logger(configure(state["log_dir"], ["tensorboard", *(["stdout"] if self.verbose else [])]))
        total_timesteps, callback = super()._setup_learn(*args, **kwargs)
        self._custom_logger = has_logger
        return total_timesteps, callback

    def learn(
        self: SelfREINFORCE,
        total_timesteps: int = 100_000,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str = "REINFORCE",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfREINFORCE:
        if self._state_to_restore is not None:
            reset_num_timesteps = False
            if total_timesteps != self._total_timesteps:
                warnings.warn(
                    f"total_timesteps={total_timesteps}, the run that is resumed has {self._total_timesteps}: "
                    "schedules are no longer those of that run"
                )
            total_timesteps -= self.num_timesteps
        if reset_num_timesteps:  # The schedules start again too
            self._kl_learning_rate_factor = 1.0
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,  # type: ignore[arg-type]
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )
