"""The critic: a value function with an optimizer of its own. Knows no SB3 algorithm, no logger and no environment."""

import math
from collections.abc import Iterable
from copy import deepcopy

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.utils import update_learning_rate
from torch.nn import functional as F

from sb3_reinforce.batch import EpisodeRolloutBufferSamples
from sb3_reinforce.batch_policy import batch_policy, critic_parameters
from sb3_reinforce.buffers import EpisodeRolloutBuffer
from sb3_reinforce.parallel.processes import all_sum_tensors, mean_and_var


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
        # A policy without a critic gets an optimizer too, so that every model is saved in the same form
        self.optimizer = policy.optimizer_class(
            self.parameters or [th.nn.Parameter(th.zeros(0))],
            lr=learning_rate,  # type: ignore[call-arg]
            **policy.optimizer_kwargs,
        )

    def _scale(self, rms: RunningMeanStd) -> tuple[float, float]:
        """
        Find what turns the output of the network into returns.

        :param rms: Statistics of the targets
        :return: Number to add, and number to multiply with first, in the unit of the returns
        """
        return (float(rms.mean), float(np.sqrt(rms.var + 1e-8))) if self.normalize else (0.0, 1.0)

    def predict(self, batches: Iterable[EpisodeRolloutBufferSamples]) -> np.ndarray:
        """
        Estimate the value of steps.

        :param batches: Parts of a batch
        :return: Values in the unit of the returns, in double precision, shape ``(n_steps,)``
        """
        policy = batch_policy(self.policy)
        with th.no_grad():
            values = [policy.values(batch).cpu().numpy().astype(np.float64) for batch in batches]
        mean, std = self._scale(self.rms)
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
                values[i] = self.predict([buffer.last_observation(episode)])[0]
        return values

    def fit(self, buffer: EpisodeRolloutBuffer, n_epochs: int, batch_size: int, learning_rate: float) -> float:
        """
        Fit the critic to the targets of the batch.

        :param buffer: Finished buffer, with its ``targets``
        :param n_epochs: Number of passes over the batch
        :param batch_size: Number of steps of a minibatch, over all processes
        :param learning_rate: Learning rate
        :return: Mean squared error of the last pass, in the squared unit of the returns
        :raises ValueError: If the error is not finite; the critic is then the one from before
        """
        policy = batch_policy(self.policy)
        rms = self.rms.copy()
        target_mean, target_var = mean_and_var(buffer.targets.astype(np.float64))
        rms.update_from_moments(target_mean, target_var, buffer.total_steps)  # type: ignore[arg-type]
        mean, std = self._scale(rms)
        parameters = [parameter for parameter in self.parameters if parameter.requires_grad]
        before = [parameter.detach().clone() for parameter in parameters], deepcopy(self.optimizer.state_dict())
        update_learning_rate(self.optimizer, learning_rate)
        # Features shared with the actor are not to change, not even the statistics of batch norm
        self.policy.features_extractor.train(not self.policy.share_features_extractor)
        for _ in range(n_epochs):
            losses, sizes = [], []
            for batch, size in buffer.get_minibatches(batch_size):
                assert batch.targets is not None
                loss = F.mse_loss(policy.values(batch), (batch.targets - mean) / std, reduction="sum") / size
                gradients = th.autograd.grad(loss, parameters, allow_unused=True) if parameters else []
                total_loss, *summed = all_sum_tensors([loss.detach(), *gradients])
                losses.append(float(total_loss))  # type: ignore[arg-type]
                sizes.append(size)
                if not math.isfinite(losses[-1]):
                    self._restore(parameters, *before)
                    raise ValueError(f"The loss of the critic is not finite ({losses[-1]}): it was not changed")
                for parameter, gradient in zip(parameters, summed, strict=True):
                    parameter.grad = gradient
                self.optimizer.step()
        # The optimizer of the policy, which holds these parameters too, is to leave them alone
        self.optimizer.zero_grad()
        self.policy.features_extractor.train()
        vars(self.rms).update(vars(rms))
        return float(np.average(losses, weights=sizes)) * std**2

    def _restore(self, parameters: list[th.nn.Parameter], values: list[th.Tensor], optimizer_state: dict) -> None:
        self.optimizer.zero_grad()
        with th.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(optimizer_state)
