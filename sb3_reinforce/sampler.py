"""
From observations to sampled actions.

To sample one action through PyTorch costs several times what a small network needs to be computed. For a policy of plain
layers :class:`NumpySampler` samples in NumPy, on the memory of the policy's own parameters; :class:`TorchSampler` asks
the policy. Both are called in the same way.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias, TypeGuard

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
from sb3_reinforce.recurrent import ReinforceLstmPolicy

#: A function of an array, which may write its result into the second one
Function: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]

#: Weight, bias and activation of a layer
Layer: TypeAlias = tuple[np.ndarray, np.ndarray, Function | None]


class Sampler(Protocol):
    """Samples an action in each environment, one step after the other."""

    def __call__(self, obs: VecEnvObs, action_masks: np.ndarray | None = None, greedy: np.ndarray | None = None) -> np.ndarray:
        """
        Sample actions.

        :param obs: Observations, shape ``(n_envs, *obs_shape)``, or a dict of them
        :param action_masks: Whether each action is valid, shape ``(n_envs, mask_size)``, ``None`` if all are
        :param greedy: Which environments get the likeliest action instead of a sample, shape ``(n_envs,)``, ``None`` if none
        :return: Actions, shape ``(n_envs, *action_shape)``
        """

    def start_episodes(self, dones: np.ndarray) -> None:
        """
        Forget what was remembered of episodes that are over.

        :param dones: Whether the last step ended the episode, shape ``(n_envs,)``
        """


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


class Memory:
    """
    A recurrent network of PyTorch as NumPy arrays, on the memory of its parameters, and its states. Formulas as in the
    documentation of ``torch.nn.LSTM`` and ``torch.nn.GRU``.

    :param network: The network
    :param n_envs: Number of environments
    """

    def __init__(self, network: nn.RNNBase, n_envs: int):
        self._step = self._lstm if isinstance(network, nn.LSTM) else self._gru
        #: Of each layer: weights and biases for its input and for its last output
        self._layers = []
        for i in range(network.num_layers):
            names = [f"{kind}_{part}_l{i}" for part in ("ih", "hh") for kind in ("weight", "bias")]
            arrays = [getattr(network, name).detach().numpy() if hasattr(network, name) else np.float32(0) for name in names]
            self._layers.append((arrays[0].T, arrays[1], arrays[2].T, arrays[3]))
        #: Hidden states and cells, shape ``(2, n_layers, n_envs, hidden_size)``
        self.states = np.zeros((2, network.num_layers, n_envs, network.hidden_size), np.float32)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        for i, (w_x, b_x, w_h, b_h) in enumerate(self._layers):
            hidden, cell = self.states[:, i]
            x = self._step(x.dot(w_x) + b_x, hidden.dot(w_h) + b_h, hidden, cell)
        return x

    @staticmethod
    def _lstm(of_x: np.ndarray, of_h: np.ndarray, hidden: np.ndarray, cell: np.ndarray) -> np.ndarray:
        size = hidden.shape[1]
        gates = of_x + of_h
        opened = expit(gates[:, : 2 * size])
        cell *= opened[:, size:]
        cell += opened[:, :size] * np.tanh(gates[:, 2 * size : 3 * size])
        np.multiply(expit(gates[:, 3 * size :]), np.tanh(cell), out=hidden)
        return hidden

    @staticmethod
    def _gru(of_x: np.ndarray, of_h: np.ndarray, hidden: np.ndarray, _: np.ndarray) -> np.ndarray:
        size = hidden.shape[1]
        opened = expit(of_x[:, : 2 * size] + of_h[:, : 2 * size])
        new = np.tanh(of_x[:, 2 * size :] + opened[:, :size] * of_h[:, 2 * size :])
        hidden -= new
        hidden *= opened[:, size:]
        hidden += new
        return hidden

    def start_episodes(self, dones: np.ndarray) -> None:
        """
        Set the states of some environments to zero.

        :param dones: Which, shape ``(n_envs,)``
        """
        self.states[:, :, dones] = 0


def networks(policy: Any) -> tuple[list[nn.Module], list[nn.Module]]:
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
        type(policy) in (ReinforcePolicy, ReinforceLstmPolicy)
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
        self._starts, self._states = np.ones(n_envs, dtype=bool), None

    def __call__(self, obs: VecEnvObs, action_masks: np.ndarray | None = None, greedy: np.ndarray | None = None) -> np.ndarray:
        device = self.policy.device
        batch = EpisodeRolloutBufferSamples(
            obs_as_tensor(obs, device),  # type: ignore[arg-type]
            episode_starts=th.as_tensor(self._starts, device=device),
            action_masks=None if action_masks is None else th.as_tensor(action_masks, device=device),
        )
        with th.no_grad():
            distribution, self._states = batch_policy(self.policy).step(batch, self._states)
            actions = distribution.get_actions()
            if greedy is not None:
                chosen = th.as_tensor(greedy, device=device)
                actions[chosen] = distribution.get_actions(deterministic=True)[chosen]
        self._starts = np.zeros_like(self._starts)
        return actions.cpu().numpy().reshape(self._actions_shape)

    def start_episodes(self, dones: np.ndarray) -> None:
        self._starts = dones


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
        self._memory: Memory | None = None
        self._masks: np.ndarray | None = None
        self._greedy: np.ndarray | None = None
        self._bind()
        size = self._mean[-1][0].shape[1]
        self._noise_shape = (max(1, NOISE_BLOCK // (n_envs * size)), n_envs, size)
        self._blocks = self._noise().__next__

    def _bind(self) -> None:
        """Take the memory of the parameters of the actor, and note where it is."""
        networks_ = networks(self.policy)
        self._mean, self._std = (to_layers(modules) or [] for modules in networks_)
        self._parameters = [parameter for modules in networks_ for module in modules for parameter in module.parameters()]
        if isinstance(self.policy.action_space, spaces.Box) and not self._std:
            self._log_std = self.policy.log_std.detach().numpy()[None]
            self._parameters.append(self.policy.log_std)
        if isinstance(self.policy, ReinforceLstmPolicy):
            memory = Memory(self.policy.lstm_actor, self.n_envs)
            if self._memory is not None:
                memory.states = self._memory.states
            self._memory = memory
            self._parameters += self.policy.lstm_actor.parameters()
        self._pointers = list(map(DATA_PTR, self._parameters))

    def __call__(self, obs: VecEnvObs, action_masks: np.ndarray | None = None, greedy: np.ndarray | None = None) -> np.ndarray:
        # Most changes of parameters are made in place. Some give them other memory
        if list(map(DATA_PTR, self._parameters)) != self._pointers:
            self._bind()
        features = obs.astype(np.float32)  # type: ignore[union-attr]
        features = features if features.ndim == 2 else features.reshape(self.n_envs, -1)
        self._masks, self._greedy = action_masks, greedy
        return self._sample(features if self._memory is None else self._memory(features))

    def start_episodes(self, dones: np.ndarray) -> None:
        if self._memory is not None:
            self._memory.start_episodes(dones)

    def _noise(self) -> Iterator[np.ndarray]:
        """
        Draw noise, a block at a time.

        :return: Independent noise for one step after the other, shape ``(n_envs, size)``
        """
        while True:
            yield from self._draw(th.empty(self._noise_shape)).numpy()

    def _next_noise(self) -> np.ndarray:
        noise = self._blocks()
        if self._greedy is not None:
            noise[self._greedy] = 0
        return noise

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
            noise = latent.dot(distribution.exploration_mat.detach().numpy())
        else:
            noise = np.einsum("ef,efa->ea", latent, distribution.exploration_matrices.detach().numpy())
        if self._greedy is not None:
            noise[self._greedy] = 0
        actions += noise
        if self.policy.squash_output:
            actions = np.tanh(actions)
        return actions.reshape(self._actions_shape)

    def _noisy_logits(self, obs: np.ndarray) -> np.ndarray:
        logits = forward(self._mean, obs)
        logits += self._next_noise()
        if self._masks is not None:
            logits[~self._masks] = -np.inf
        return logits

    def _sample_categorical(self, obs: np.ndarray) -> np.ndarray:
        return self._noisy_logits(obs).argmax(axis=1)

    def _sample_multi_categorical(self, obs: np.ndarray) -> np.ndarray:
        parts = np.split(self._noisy_logits(obs), self._splits, axis=1)
        return np.stack([part.argmax(axis=1) for part in parts], axis=1)

    def _sample_bernoulli(self, obs: np.ndarray) -> np.ndarray:
        logits = forward(self._mean, obs)
        logits += self._next_noise()
        values = logits > 0
        if self._masks is not None:
            values = (values & self._masks[:, 1::2]) | ~self._masks[:, ::2]
        return values.astype(np.float32)


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
