"""
From observations to sampled actions.

To sample one action through PyTorch costs several times what a small network needs to be computed. For a policy of plain
layers :class:`NumpySampler` samples in NumPy, on the memory of the policy's own parameters; :class:`TorchSampler` asks
the policy. Both are called in the same way.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import torch as th
from gymnasium import spaces
from scipy.special import expit
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs
from torch import nn

from sb3_reinforce.batch import EpisodeRolloutBufferSamples
from sb3_reinforce.batch_policy import batch_policy
from sb3_reinforce.policies import ReinforcePolicy, TwoTrunkExtractor

#: A function of observations of shape ``(n_envs, *obs_shape)`` that gives actions of shape ``(n_envs, *action_shape)``
Sampler: TypeAlias = Callable[[VecEnvObs], np.ndarray]

#: A function of an array, which may write its result into the second one
Function: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]

#: Weight, bias and activation of a layer
Layer: TypeAlias = tuple[np.ndarray, np.ndarray, Function | None]

#: About how many random numbers are drawn at once
NOISE_BLOCK = 4096

DATA_PTR = th.Tensor.data_ptr

#: What activations do
ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Function]] = {
    nn.ELU: lambda module: lambda x, _: np.where(x > 0, x, module.alpha * np.expm1(np.minimum(x, 0))),
    nn.LeakyReLU: lambda module: lambda x, _: np.where(x > 0, x, module.negative_slope * x),
    nn.ReLU: lambda module: lambda x, out: np.maximum(x, 0, out=out),
    nn.Sigmoid: lambda module: lambda x, out: expit(x, out=out),
    nn.SiLU: lambda module: lambda x, _: x * expit(x),
    nn.Tanh: lambda module: np.tanh,
}


def to_layers(modules: list[nn.Module]) -> list[Layer] | None:
    """
    View the layers of a network as NumPy arrays, on the memory of their parameters.

    :param modules: The modules of the network, in their order
    :return: The layers; ``None`` if there are modules other than linear layers, each with one of the known activations or
        none
    """
    layers: list[Layer] = []
    for module in modules:
        if type(module) is nn.Linear:
            # One environment's numbers have the shape of the bias then, and NumPy adds sooner without broadcasting
            layers.append((module.weight.detach().numpy().T, module.bias.detach().numpy()[None], None))
        elif layers and layers[-1][2] is None and type(module) in ACTIVATIONS:
            layers[-1] = (*layers[-1][:2], ACTIVATIONS[type(module)](module))
        else:
            return None
    return layers


def forward(layers: list[Layer], x: np.ndarray) -> np.ndarray:
    """
    Compute the output of a network.

    :param layers: Layers of the network
    :param x: Its input, shape ``(n_envs, n_features)``
    :return: Its output
    """
    for weight, bias, activation in layers:
        x = x.dot(weight)
        x += bias
        if activation is not None:
            x = activation(x, x)
    return x


def gumbel_(tensor: th.Tensor) -> th.Tensor:
    """
    Draw Gumbel noise.

    :param tensor: Memory
    :return: The memory, filled with noise: the largest logit with noise is a sample of the categorical distribution
    """
    return tensor.exponential_().log_().neg_()


def logistic_(tensor: th.Tensor) -> th.Tensor:
    """
    Draw logistic noise.

    :param tensor: Memory
    :return: The memory, filled with noise: a logit is positive with noise as often as a Bernoulli variable is one
    """
    return tensor.uniform_().logit_()


def networks(policy: ReinforcePolicy) -> tuple[list[nn.Module], list[nn.Module]]:
    """
    List the modules of the actor.

    :param policy: A policy
    :return: The modules that make the mean (or the logits) of the observations, and those that make the standard
        deviation, if it depends on the observations
    """
    trunk = policy.mlp_extractor
    mean_modules = [*trunk.policy_net.children(), policy.action_net]
    if not policy.state_dependent_std:
        return mean_modules, []
    std_trunk = trunk.std_net if isinstance(trunk, TwoTrunkExtractor) else trunk.policy_net
    return mean_modules, [*std_trunk.children(), policy.std_net]


def is_plain(policy: ActorCriticPolicy) -> TypeGuard[ReinforcePolicy]:
    """
    Tell whether NumPy can sample the actions of a policy.

    :param policy: A policy
    :return: Whether :class:`NumpySampler` does what this policy does: Box observations other than images, layers that it
        knows, on the CPU
    """
    return (
        type(policy) is ReinforcePolicy
        and type(policy.mlp_extractor) in (MlpExtractor, TwoTrunkExtractor)
        and type(policy.pi_features_extractor) is FlattenExtractor
        and isinstance(policy.observation_space, spaces.Box)
        and not is_image_space(policy.observation_space)
        and not any(module._forward_hooks or module._forward_pre_hooks for module in policy.modules())
        and all(p.device.type == "cpu" and p.dtype == th.float32 for p in policy.parameters())
        and None not in map(to_layers, networks(policy))
    )


class TorchSampler:
    """
    Sample actions with PyTorch, from any policy.

    :param policy: A policy
    :param n_envs: Number of environments
    """

    def __init__(self, policy: ActorCriticPolicy, n_envs: int):
        self.policy = policy
        self._actions_shape = (n_envs, *policy.action_space.shape)  # type: ignore[misc]

    def __call__(self, obs: VecEnvObs) -> np.ndarray:
        batch = EpisodeRolloutBufferSamples(obs_as_tensor(obs, self.policy.device))  # type: ignore[arg-type]
        with th.no_grad():
            actions = batch_policy(self.policy).distribution(batch).get_actions()
        return actions.cpu().numpy().reshape(self._actions_shape)


class NumpySampler:
    """
    Sample actions with NumPy, on the memory of the policy's parameters: when they change, so does the next action.

    The noise comes from PyTorch's global generator, but in blocks: these are other actions than those which the policy
    would sample. With gSDE they are the same, as the policy holds the noise.

    :param policy: A policy for which :func:`is_plain` is true
    :param n_envs: Number of environments
    """

    def __init__(self, policy: ReinforcePolicy, n_envs: int):
        self.policy = policy
        self.n_envs = n_envs
        space = policy.action_space
        samplers: dict[Any, tuple[Callable[[np.ndarray], np.ndarray], Callable[[th.Tensor], th.Tensor]]] = {
            spaces.Box: (self._sample_gaussian, th.Tensor.normal_),
            spaces.Discrete: (self._sample_categorical, gumbel_),
            spaces.MultiDiscrete: (self._sample_multi_categorical, gumbel_),
            spaces.MultiBinary: (self._sample_bernoulli, logistic_),
        }
        # A subclass of a space is sampled as the space
        self._sample, self._draw = next(sampler for kind, sampler in samplers.items() if isinstance(space, kind))
        if policy.use_sde:
            self._sample = self._sample_sde
        self._splits: Any = np.cumsum(space.nvec)[:-1] if isinstance(space, spaces.MultiDiscrete) else []
        self._actions_shape = (n_envs, *space.shape)  # type: ignore[misc]
        self._bind()
        size = self._mean[-1][0].shape[1]
        self._noise_shape = (max(1, NOISE_BLOCK // (n_envs * size)), n_envs, size)
        self._next_noise = self._noise().__next__

    def _bind(self) -> None:
        """Take the memory of the parameters of the actor, and note where it is."""
        networks_ = networks(self.policy)
        self._mean, self._std = (to_layers(modules) or [] for modules in networks_)
        self._parameters = [parameter for modules in networks_ for module in modules for parameter in module.parameters()]
        if isinstance(self.policy.action_space, spaces.Box) and not self._std:
            self._log_std = self.policy.log_std.detach().numpy()[None]
            self._parameters.append(self.policy.log_std)
        self._pointers = list(map(DATA_PTR, self._parameters))

    def __call__(self, obs: VecEnvObs) -> np.ndarray:
        # Most changes of parameters are made in place. Some give them other memory
        if list(map(DATA_PTR, self._parameters)) != self._pointers:
            self._bind()
        features = obs.astype(np.float32)  # type: ignore[union-attr]
        return self._sample(features if features.ndim == 2 else features.reshape(self.n_envs, -1))

    def _noise(self) -> Iterator[np.ndarray]:
        """
        Draw noise, a block at a time.

        :return: Independent noise for one step after the other, shape ``(n_envs, size)``
        """
        while True:
            yield from self._draw(th.empty(self._noise_shape)).numpy()

    def _sample_gaussian(self, obs: np.ndarray) -> np.ndarray:
        actions = forward(self._mean, obs)
        if self._std:
            std = np.logaddexp(forward(self._std, obs), np.float32(0)) + np.float32(self.policy.min_std)  # softplus
        else:
            std = np.exp(self._log_std)
        actions += std * self._next_noise()
        return actions if self._actions_shape == actions.shape else actions.reshape(self._actions_shape)

    def _sample_sde(self, obs: np.ndarray) -> np.ndarray:
        distribution = self.policy.action_dist
        assert isinstance(distribution, StateDependentNoiseDistribution)
        latent = forward(self._mean[:-1], obs)
        actions = forward(self._mean[-1:], latent)
        if self.n_envs == 1:
            actions += latent.dot(distribution.exploration_mat.detach().numpy())
        else:
            actions += np.einsum("ef,efa->ea", latent, distribution.exploration_matrices.detach().numpy())
        if self.policy.squash_output:
            actions = np.tanh(actions)
        return actions.reshape(self._actions_shape)

    def _sample_categorical(self, obs: np.ndarray) -> np.ndarray:
        logits = forward(self._mean, obs)
        logits += self._next_noise()
        return logits.argmax(axis=1)

    def _sample_multi_categorical(self, obs: np.ndarray) -> np.ndarray:
        logits = forward(self._mean, obs)
        logits += self._next_noise()
        return np.stack([part.argmax(axis=1) for part in np.split(logits, self._splits, axis=1)], axis=1)

    def _sample_bernoulli(self, obs: np.ndarray) -> np.ndarray:
        logits = forward(self._mean, obs)
        logits += self._next_noise()
        return (logits > 0).astype(np.float32)


def make_sampler(policy: ActorCriticPolicy, n_envs: int) -> Sampler:
    """
    Choose the fastest sampler that does what a policy does.

    :param policy: A policy
    :param n_envs: Number of environments
    :return: The sampler
    """
    return NumpySampler(policy, n_envs) if is_plain(policy) else TorchSampler(policy, n_envs)


def reset_noise(policy: ActorCriticPolicy, env_indices: np.ndarray, n_envs: int) -> None:
    """
    Draw new noise for the gSDE of some environments.

    :param policy: A policy with gSDE
    :param env_indices: Indices of the environments
    :param n_envs: Number of environments
    """
    distribution = policy.action_dist
    assert isinstance(distribution, StateDependentNoiseDistribution)
    kept = distribution.exploration_matrices
    with th.no_grad():  # Sampled noise has no part in the gradient
        policy.reset_noise(n_envs)
    if len(env_indices) < n_envs == len(kept):
        chosen = th.from_numpy(np.isin(np.arange(n_envs), env_indices)).to(kept.device)[:, None, None]
        distribution.exploration_matrices = th.where(chosen, distribution.exploration_matrices, kept)
