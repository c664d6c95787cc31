"""The policy gradient of a batch. Knows no SB3 algorithm, no logger and no environment."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch as th
from stable_baselines3.common.distributions import DiagGaussianDistribution, StateDependentNoiseDistribution
from torch import nn

from sb3_reinforce.batch import EpisodeRolloutBufferSamples
from sb3_reinforce.batch_policy import BatchPolicy
from sb3_reinforce.parallel.processes import all_sum, all_sum_tensors

#: Distributions that have a standard deviation to log
GAUSSIANS = (DiagGaussianDistribution, StateDependentNoiseDistribution)


class PolicyGradient(NamedTuple):
    """
    Gradient of the loss, whose negative is the policy gradient.

    :param parameters: The parameters that the policy depends on
    :param gradient: Gradient with respect to each of them, clipped if asked for
    :param norm: Euclidean norm of the gradient before clipping
    :param loss: Policy loss ``-1/N sum w log pi``
    :param entropy_loss: Mean negative entropy of the steps, in nats
    :param std: Mean standard deviation of the steps, in the unit of the action; ``None`` for actions that are not continuous
    """

    parameters: list[nn.Parameter]
    gradient: list[th.Tensor]
    norm: float
    loss: float
    entropy_loss: float
    std: float | None

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers to log."""
        found = {"policy_loss": self.loss, "entropy_loss": self.entropy_loss, "grad_norm": self.norm}
        return found if self.std is None else found | {"std": self.std}

    @property
    def is_zero(self) -> bool:
        """Whether there is nothing to learn."""
        return not any(part.any() for part in self.gradient)


def policy_gradient(
    policy: BatchPolicy,
    batches: Iterable[EpisodeRolloutBufferSamples],
    count: int,
    total_steps: int,
    ent_coef: float = 0.0,
    max_grad_norm: float | None = None,
) -> PolicyGradient:
    """
    Compute the gradient of the loss ``-1/count sum (w log pi + ent_coef * entropy)`` over the steps of all processes.

    :param policy: Policy
    :param batches: Parts of the batch, whose ``advantages`` are the factors ``w``
    :param count: What the sums are divided by: the number of episodes, or that of steps
    :param total_steps: Number of steps of all processes
    :param ent_coef: Entropy coefficient
    :param max_grad_norm: Norm to clip the gradient to, ``None`` for no clipping
    :return: The gradient, and numbers to log
    :raises ValueError: If the gradient is not finite
    """
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    gradient: list[th.Tensor | None] = [None] * len(parameters)
    sums = [0.0, 0.0, 0.0, 0.0]
    for batch in batches:
        distribution = policy.distribution(batch)
        assert batch.actions is not None and batch.advantages is not None
        log_prob = distribution.log_prob(batch.actions)
        entropy = distribution.entropy()
        policy_loss = -(batch.advantages * log_prob).sum()
        # Approximate entropy when no analytical form
        entropy_loss = -(-log_prob if entropy is None else entropy).sum()
        loss = policy_loss + ent_coef * entropy_loss if ent_coef else policy_loss
        parts = th.autograd.grad(loss / count, parameters, allow_unused=True)
        gradient = [part if total is None else total + part for total, part in zip(gradient, parts, strict=True)]
        new = [policy_loss.item(), entropy_loss.item(), 0.0, 0.0]
        if isinstance(distribution, GAUSSIANS):
            stddev = distribution.distribution.stddev
            new[2:] = stddev.sum().item(), stddev.numel()
        sums = [total + part for total, part in zip(sums, new, strict=True)]

    summed = all_sum_tensors(gradient, parameters)
    found = [(parameter, part) for parameter, part in zip(parameters, summed, strict=True) if part is not None]
    norm = nn.utils.get_total_norm([part for _, part in found])
    if max_grad_norm is not None:
        factor = th.clamp(max_grad_norm / (norm + 1e-6), max=1.0)
        found = [(parameter, part * factor) for parameter, part in found]
    loss_sum, entropy_sum, std_sum, std_count = all_sum(sums).tolist()
    if not math.isfinite(norm):
        raise ValueError(
            f"The policy gradient is not finite (norm {norm.item()}, policy_loss {loss_sum / count}): no step was "
            "made. Rewards that are too large, or a standard deviation near zero, are the usual reasons"
        )
    return PolicyGradient(
        parameters=[parameter for parameter, _ in found],
        gradient=[part for _, part in found],
        norm=norm.item(),
        loss=loss_sum / count,
        entropy_loss=entropy_sum / total_steps,
        std=std_sum / std_count if std_count else None,
    )
