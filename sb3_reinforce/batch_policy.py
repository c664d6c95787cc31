"""What REINFORCE asks of a policy: methods that take a batch, and the parameters of the actor and of the critic."""

from typing import Any, Protocol

import torch as th
from gymnasium.vector.utils import create_empty_array
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.distributions import Distribution, kl_divergence
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_reinforce.batch import EpisodeRolloutBufferSamples
from sb3_reinforce.masks import mask_distribution


class BatchPolicy(Protocol):
    """A policy as the update knows it. Memory and masks are matters of the policy: the update only hands the batch on."""

    def distribution(self, batch: EpisodeRolloutBufferSamples) -> Distribution: ...

    def values(self, batch: EpisodeRolloutBufferSamples) -> th.Tensor: ...

    def step(self, batch: EpisodeRolloutBufferSamples, states: Any) -> tuple[Distribution, Any]: ...

    def parameters(self) -> Any: ...

    def set_training_mode(self, mode: bool) -> None: ...


class BatchMethods:
    """Mixin for an ``ActorCriticPolicy`` whose distribution and value depend on the observation alone."""

    def distribution(self: Any, batch: EpisodeRolloutBufferSamples) -> Distribution:
        """
        Compute the distribution of the actions.

        :param batch: Steps
        :return: The distribution of each step. A policy has one distribution object: the next call changes it
        """
        return mask_distribution(self.get_distribution(batch.observations), batch.action_masks)

    def values(self: Any, batch: EpisodeRolloutBufferSamples) -> th.Tensor:
        """
        Compute the output of the critic.

        :param batch: Steps
        :return: Values, shape ``(n_steps,)``
        """
        return self.predict_values(batch.observations).flatten()

    def step(self: Any, batch: EpisodeRolloutBufferSamples, states: Any) -> tuple[Distribution, Any]:
        """
        Compute the distribution of the next action in each environment.

        :param batch: One step of each environment
        :param states: What the policy remembers, ``None`` at the start
        :return: The distribution, and what the policy remembers now
        """
        return self.distribution(batch), None


class Adapter(BatchMethods):
    """
    Give an ``ActorCriticPolicy`` that was written for A2C or PPO the methods of :class:`BatchMethods`.

    :param policy: The policy
    """

    def __init__(self, policy: ActorCriticPolicy):
        self._policy = policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)


def batch_policy(policy: ActorCriticPolicy) -> BatchPolicy:
    """
    Make sure that a policy has the methods that the update calls.

    :param policy: A policy
    :return: The policy itself, or an adapter of it
    """
    return policy if hasattr(policy, "distribution") else Adapter(policy)  # type: ignore[return-value]


def has_memory(policy: ActorCriticPolicy) -> bool:
    """
    Tell whether a policy has to see whole episodes.

    :param policy: A policy
    :return: Whether it remembers earlier steps of an episode
    """
    return isinstance(policy, RecurrentActorCriticPolicy)


def divergence(old: Distribution, new: Distribution) -> th.Tensor:
    """
    Compute the KL divergence between two distributions of actions.

    :param old: Distribution of each step
    :param new: Another one of the same kind
    :return: ``KL(old || new)`` in nats, of each step or of each action of it
    :raises NotImplementedError: If SB3 and PyTorch have no formula for it
    """
    try:
        return kl_divergence(old, new)
    except (AttributeError, AssertionError, NotImplementedError, TypeError) as error:
        raise NotImplementedError(
            f"The KL divergence of {type(old).__name__} cannot be computed ({error!r}): natural_gradient=False with "
            "target_kl=None does without it"
        ) from error


def critic_parameters(policy: ActorCriticPolicy) -> list[nn.Parameter]:
    """
    Find the parameters that the critic has for itself: the value depends on them, and the distribution does not. They are
    found in the graphs of both, as a custom network need not tell which of its parts is the critic.

    :param policy: A policy
    :return: Parameters, from the head down to the features
    """
    parameters = [parameter for child in reversed(list(policy.children())) for parameter in child.parameters()]
    are_frozen = [not parameter.requires_grad for parameter in parameters]
    was_training = policy.training
    zeros: Any = create_empty_array(policy.observation_space, n=1)
    observations, _ = policy.obs_to_tensor(zeros)
    batch = EpisodeRolloutBufferSamples(observations, episode_starts=th.ones(1, dtype=th.bool, device=policy.device))
    policy.set_training_mode(False)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        value = batch_policy(policy).values(batch).sum()
        distribution = batch_policy(policy).distribution(batch)
        log_prob = distribution.log_prob(distribution.mode()).sum()
        of_value, of_actor = (
            th.autograd.grad(output, parameters, allow_unused=True) if output.requires_grad else [None] * len(parameters)
            for output in (value, log_prob)
        )
    finally:
        policy.set_training_mode(was_training)
        for parameter, is_frozen in zip(parameters, are_frozen, strict=True):
            parameter.requires_grad_(not is_frozen)
    return [p for p, value, actor in zip(parameters, of_value, of_actor, strict=True) if value is not None and actor is None]
