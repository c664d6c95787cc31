"""A step that the KL divergence limits, by a backtracking line search. Knows no SB3 algorithm and no environment."""

import math
from collections.abc import Sequence
from copy import copy
from types import TracebackType
from typing import Any

import numpy as np
import torch as th
from torch import nn

from sb3_reinforce.batch import Chunks
from sb3_reinforce.batch_policy import BatchPolicy, divergence
from sb3_reinforce.parallel.processes import all_sum
from sb3_reinforce.snapshot import Snapshot

#: A step that is still too long after so many halvings is not made at all.
MAX_HALVINGS = 20

#: How far the KL target can take the learning rate from the given one.
LEARNING_RATE_FACTORS = (1e-6, 1e3)


class PolicyStep:
    """
    A step of the policy that can be measured, shortened and taken back. As a context manager, it is taken back if an error
    or Ctrl-C interrupts it: the parameters and the state of the optimizer are then those from before.

    :param policy: Policy
    :param parameters: Parameters that the step changes
    :param optimizer: Optimizer whose state the step changes
    :param chunks: The batch in parts
    :param total_steps: Number of steps of all processes
    """

    def __init__(
        self,
        policy: BatchPolicy,
        parameters: Sequence[nn.Parameter],
        optimizer: th.optim.Optimizer,
        chunks: Chunks,
        total_steps: int,
    ):
        self._policy = policy
        self._parameters = parameters
        self._optimizer = optimizer
        self._chunks = chunks
        self._total_steps = total_steps
        self._before = Snapshot(parameters, optimizer)
        self._old_distribution = None
        if len(chunks) == 1:
            with th.no_grad():
                # The policy has a single distribution object, which the next call changes
                self._old_distribution = copy(policy.distribution(next(iter(chunks))))

    def __enter__(self) -> "PolicyStep":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._optimizer.zero_grad()
        if kind is not None:
            self.undo()

    def optimize(self, gradient: Sequence[th.Tensor], learning_rate: float) -> None:
        """
        Make the step of the optimizer.

        :param gradient: Gradient with respect to each parameter
        :param learning_rate: Learning rate
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        for parameter, part in zip(self._parameters, gradient, strict=True):
            parameter.grad = part.contiguous()
        self._optimizer.step()

    def move(self, direction: Sequence[th.Tensor], length: float) -> None:
        """
        Make a step against a direction, without the optimizer.

        :param direction: Direction with respect to each parameter
        :param length: Factor of the direction
        """
        for parameter, part in zip(self._parameters, direction, strict=True):
            parameter.data.sub_(length * part)

    def undo(self) -> None:
        """Take the step back, with what the optimizer remembers of it."""
        self._before.restore()

    def kl(self) -> float:
        """
        Measure the step.

        :return: Mean over the batch of ``KL(old || new)``, in nats; infinite if the new parameters make no distribution
        :raises NotImplementedError: If there is no formula for it
        """
        old: Any = self._old_distribution
        after = [] if old else [parameter.detach().clone() for parameter in self._parameters]
        total = 0.0
        try:
            with th.no_grad():
                for batch in self._chunks:
                    if self._old_distribution is None:  # To keep it would take memory for the whole batch
                        self._before.set_parameters(self._before.values)
                        old = copy(self._policy.distribution(batch))
                        self._before.set_parameters(after)
                    total += divergence(old, self._policy.distribution(batch)).sum().item()
        except ValueError:  # PyTorch's word for parameters that are not those of a distribution
            total = math.inf
        return float(all_sum(total)) / self._total_steps

    def backtrack(self, max_kl: float) -> tuple[float, float]:
        """
        Halve the step until its divergence is at most ``max_kl`` (backtracking line search), or take it back.

        :param max_kl: Largest divergence allowed, in nats
        :return: Divergence, in nats, and the share of the step that is left, 0 if it was taken back
        """
        share = 1.0
        kl = self.kl()
        while not kl <= max_kl and share > 0.5**MAX_HALVINGS:  # NaN is too far as well
            for parameter, start in zip(self._parameters, self._before.values, strict=True):
                parameter.data.lerp_(start, 0.5)
            share /= 2
            kl = self.kl()
        if 0 < max_kl and kl <= max_kl:
            return kl, share
        self.undo()
        return 0.0, 0.0


def adapt_learning_rate(factor: float, kl: float, target_kl: float, share: float) -> float:
    """
    Let the factor of the learning rate follow the target: the divergence grows with the square of the step.

    :param factor: Factor of the learning rate of this step
    :param kl: Divergence of the step, in nats
    :param target_kl: Divergence that the step should have had
    :param share: Share of the step that :meth:`PolicyStep.backtrack` has left
    :return: Factor of the learning rate of the next step
    """
    change = share * np.clip(math.sqrt(target_kl / max(kl, 1e-12)), 0.5, 1.5) if share else 0.5
    return float(np.clip(change * factor, *LEARNING_RATE_FACTORS))
