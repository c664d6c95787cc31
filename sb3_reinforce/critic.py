"""The critic: a value function with an optimizer of its own. Knows no SB3 algorithm, no logger and no environment."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.utils import update_learning_rate
from torch.nn import functional as F

from sb3_reinforce.batch import EpisodeRolloutBufferSamples
from sb3_reinforce.batch_policy import batch_policy, critic_parameters, has_memory
from sb3_reinforce.buffers import EpisodeRolloutBuffer
from sb3_reinforce.parallel.processes import all_sum_tensors, mean_and_var
from sb3_reinforce.policies import OPTIMIZER_KWARGS
from sb3_reinforce.snapshot import Snapshot

#: Of the critic's Adam where those of the policy are not given: its targets change slowly
VALUE_OPTIMIZER_KWARGS = {**OPTIMIZER_KWARGS, "betas": (0.9, 0.999)}


class Critic:
    """
    Fit the value function of a policy to returns. Parameters that it shares with the actor are left to the policy gradient.

    :param policy: The policy whose critic this is
    :param rms: Running statistics of the targets, which :meth:`fit` changes
    :param learning_rate: Learning rate at the start
    :param normalize: Whether the critic learns its targets less their running mean, over their running standard deviation
    """

    def __init__(self, policy: ActorCriticPolicy, rms: RunningMeanStd, learning_rate: float, normalize: bool = True):
        self.policy = policy
        self.rms = rms
        self.normalize = normalize
        self.parameters = critic_parameters(policy)
        is_default = policy.optimizer_kwargs == OPTIMIZER_KWARGS
        # A policy without a critic gets an optimizer too, so that every model is saved in the same form
        self.optimizer = policy.optimizer_class(
            self.parameters or [th.nn.Parameter(th.zeros(0))],
            lr=learning_rate,  # type: ignore[call-arg]
            **(VALUE_OPTIMIZER_KWARGS if is_default else policy.optimizer_kwargs),
        )

    def _scale(self) -> tuple[float, float]:
        """
        Find what turns the output of the network into returns.

        :return: Number to add, and number to multiply with first, in the unit of the returns
        """
        return (float(self.rms.mean), float(np.sqrt(self.rms.var + 1e-8))) if self.normalize else (0.0, 1.0)

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Make a context in which an error, or Ctrl-C, leaves the critic and its optimizer as they were."""
        before, statistics = Snapshot(self.parameters, self.optimizer), vars(self.rms.copy())
        try:
            yield
        except BaseException:
            before.restore()
            vars(self.rms).update(statistics)
            raise

    def predict(self, batches: Iterable[EpisodeRolloutBufferSamples]) -> np.ndarray:
        """
        Estimate the value of steps.

        :param batches: Parts of a batch
        :return: Values in the unit of the returns, in double precision, shape ``(n_steps,)``
        """
        policy = batch_policy(self.policy)
        with th.no_grad():
            values = [policy.values(batch).cpu().numpy().astype(np.float64) for batch in batches]
        mean, std = self._scale()
        # Another process can have all episodes that are left
        return mean + std * np.concatenate([np.zeros(0), *values])

    def predict_last(self, buffer: EpisodeRolloutBuffer) -> np.ndarray:
        """
        Estimate the value of the observations after the last steps of episodes that a time limit cut off.

        :param buffer: Finished buffer
        :return: Values in the unit of the returns, zero for the other episodes, shape ``(n_episodes,)``
        """
        values = np.zeros(buffer.n_episodes)
        for i, episode in enumerate(buffer.episodes):
            if episode.truncated:
                values[i] = self.predict([buffer.last_observation(episode, has_memory(self.policy))])[-1]
        return values

    def fit(self, buffer: EpisodeRolloutBuffer, n_epochs: int, batch_size: int, learning_rate: float) -> float:
        """
        Fit the critic to the targets of the batch.

        :param buffer: Finished buffer, with its ``targets``
        :param n_epochs: Number of passes over the batch
        :param batch_size: Number of steps of a minibatch, over all processes (a mean, with memory: it holds whole episodes)
        :param learning_rate: Learning rate
        :return: Mean squared error of the last pass, in the squared unit of the returns
        :raises ValueError: If the error is not finite
        """
        policy = batch_policy(self.policy)
        target_mean, target_var = mean_and_var(buffer.targets.astype(np.float64))
        self.rms.update_from_moments(target_mean, target_var, buffer.total_steps)  # type: ignore[arg-type]
        mean, std = self._scale()
        parameters = [parameter for parameter in self.parameters if parameter.requires_grad]
        update_learning_rate(self.optimizer, learning_rate)
        # Features shared with the actor are not to change, not even the statistics of batch norm
        self.policy.features_extractor.train(not self.policy.share_features_extractor)
        for _ in range(n_epochs):
            losses, sizes = [], []
            for batch, size in buffer.get_minibatches(batch_size, has_memory(self.policy)):
                assert batch.targets is not None
                loss = F.mse_loss(policy.values(batch), (batch.targets - mean) / std, reduction="sum") / size
                gradients = th.autograd.grad(loss, parameters, allow_unused=True) if parameters else []
                total_loss, *summed = all_sum_tensors([loss.detach(), *gradients], [loss, *parameters])
                losses.append(float(total_loss))  # type: ignore[arg-type]
                sizes.append(size)
                if not math.isfinite(losses[-1]):
                    raise ValueError(f"The loss of the critic is not finite ({losses[-1]})")
                for parameter, gradient in zip(parameters, summed, strict=True):
                    parameter.grad = gradient
                self.optimizer.step()
        # The optimizer of the policy, which holds these parameters too, is to leave them alone
        self.optimizer.zero_grad()
        self.policy.features_extractor.train()
        return float(np.average(losses, weights=sizes)) * std**2
