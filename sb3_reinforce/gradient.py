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
    :param signal: Estimated share of signal in the squared norm, ``None`` for a single episode or a gradient of zero
    """

    parameters: list[nn.Parameter]
    gradient: list[th.Tensor]
    norm: float
    loss: float
    entropy_loss: float
    std: float | None
    signal: float | None

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers to log."""
        found = {
            "policy_loss": self.loss,
            "entropy_loss": self.entropy_loss,
            "grad_norm": self.norm,
            "grad_signal": self.signal,
            "std": self.std,
        }
        return {name: value for name, value in found.items() if value is not None}

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
    first_half: float = 0.0,
) -> PolicyGradient:
    """
    Compute the gradient of the loss ``-1/count sum (w log pi + ent_coef * entropy)`` over the steps of all processes.

    Two halves of the episodes give independent estimates ``g_1`` and ``g_2`` of its expectation ``G``: the mean of
    ``g_1 . g_2`` is ``|G|^2``, and its share of the squared norm of the batch's gradient is the signal (McCandlish et al., An
    empirical model of large-batch training, https://arxiv.org/abs/1812.06162). Whitening and baselines from the batch itself
    tie the halves a little.

    :param policy: Policy
    :param batches: Parts of the batch, whose ``advantages`` are the factors ``w``
    :param count: What the sums are divided by: the number of episodes, or that of steps
    :param total_steps: Number of steps of all processes
    :param ent_coef: Entropy coefficient
    :param max_grad_norm: Norm to clip the gradient to, ``None`` for no clipping
    :param first_half: Share of the episodes that is the first half, from which ``signal`` is estimated if it is not 0 or 1
    :return: The gradient, and numbers to log
    :raises ValueError: If the gradient is not finite
    """
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    # That of the batch, and that of the first half of the episodes
    gradients: list[list[th.Tensor | None]] = [[None] * len(parameters), [None] * len(parameters)]
    sums = [0.0, 0.0, 0.0, 0.0]
    for batch in batches:
        distribution = policy.distribution(batch)
        assert batch.actions is not None and batch.advantages is not None and batch.halves is not None
        log_prob = distribution.log_prob(batch.actions)
        entropy = distribution.entropy()
        policy_loss = -batch.advantages * log_prob
        # Without an analytical form: an estimate of the entropy, with the gradient of its expectation. That of the estimate
        # itself, grad log pi, is zero in expectation
        fixed = log_prob.detach()
        entropy_loss = fixed + fixed * (log_prob - fixed) if entropy is None else -entropy
        loss = (policy_loss + ent_coef * entropy_loss if ent_coef else policy_loss) / count
        for i, part_loss in enumerate([loss.sum(), (loss * batch.halves).sum()]):
            parts = th.autograd.grad(part_loss, parameters, allow_unused=True, retain_graph=i == 0)
            gradients[i] = [part if old is None else old + part for old, part in zip(gradients[i], parts, strict=True)]
        new = [policy_loss.sum().item(), entropy_loss.sum().item(), 0.0, 0.0]
        if isinstance(distribution, GAUSSIANS):
            stddev = distribution.distribution.stddev
            new[2:] = stddev.sum().item(), stddev.numel()
        sums = [total + part for total, part in zip(sums, new, strict=True)]

    summed = all_sum_tensors(gradients[0] + gradients[1], [*parameters, *parameters])
    triples = zip(parameters, summed, summed[len(parameters) :], strict=False)
    used = [(parameter, part, first) for parameter, part, first in triples if part is not None and first is not None]
    norm = nn.utils.get_total_norm([part for _, part, _ in used])
    signal = None
    if 0 < first_half < 1 and norm > 0:
        between = sum(float((first * (part - first)).sum()) for _, part, first in used)
        signal = between / (first_half * (1 - first_half)) / float(norm) ** 2
    found = [(parameter, part) for parameter, part, _ in used]
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
        signal=signal,
    )
