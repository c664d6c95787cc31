from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    MlpExtractor,
    NatureCNN,
    create_mlp,
)
from stable_baselines3.common.type_aliases import Schedule
from torch import nn
from torch.nn import functional as F

from sb3_reinforce.batch_policy import BatchMethods
from sb3_reinforce.masks import MaskLayout, mask_distribution


class TwoTrunkExtractor(MlpExtractor):
    """
    An ``MlpExtractor`` whose actor has a second trunk, for the standard deviation. The actor's latent code is that of
    the mean, of size ``latent_dim_pi``, followed by that of the standard deviation, of size ``latent_dim_std``.

    :param std_net_arch: Number of units of each layer of the second trunk
    :param kwargs: Arguments of ``MlpExtractor``
    """

    def __init__(self, std_net_arch: list[int], **kwargs: Any):
        super().__init__(**kwargs)
        layers = create_mlp(kwargs["feature_dim"], 0, std_net_arch, kwargs["activation_fn"])
        self.std_net = nn.Sequential(*layers).to(kwargs["device"])
        self.latent_dim_std = std_net_arch[-1]

    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        return th.cat([self.policy_net(features), self.std_net(features)], dim=1)


#: Of the policy's Adam. Gradients of older policies are to fade quickly
OPTIMIZER_KWARGS = {"betas": (0.5, 0.999), "eps": 1e-5, "fused": True}

#: Initial standard deviation, as a share of half the range of the actions
INITIAL_STD = 0.4


#: Half ranges above this one stand for no bounds
MAX_HALF_RANGE = 1e6


def initial_gaussian(action_space: spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """
    Find the Gaussian to start from, by which few actions are clipped: around the middle of the range of each action.

    :param action_space: Action space
    :return: Means and logarithms of the standard deviations, shape ``(action_dim,)``; 0 for an action without bounds
    """
    low, high = action_space.low.ravel().astype(float), action_space.high.ravel().astype(float)
    half_range = high / 2 - low / 2
    is_bounded = (half_range > 0) & (half_range <= MAX_HALF_RANGE)
    half_range[~is_bounded] = 1 / INITIAL_STD
    return np.where(is_bounded, low + half_range, 0.0), np.log(INITIAL_STD * half_range)


class ReinforcePolicy(BatchMethods, ActorCriticPolicy):
    """
    SB3's ``ActorCriticPolicy``, whose Gaussian can have a standard deviation that depends on the observation:
    ``std = softplus(head(latent)) + min_std``, the policy of Gymnasium's tutorial "Training using REINFORCE for Mujoco".

    Arguments that are not listed are those of ``ActorCriticPolicy``. ``optimizer_kwargs`` are by default ``betas=(0.5, 0.999),
    eps=1e-5, fused=True`` for Adam: less momentum than usual, because every update has a policy of its own.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param state_dependent_std: Whether the standard deviation is a function of the observation (a linear head on the
        actor's last layer) rather than a parameter of its own. For Box actions without gSDE.
    :param std_net_arch: Number of units of each layer of a trunk of its own for the standard deviation;
        ``None``: it shares the trunk of the mean
    :param min_std: Floor of a state-dependent standard deviation, in the unit of the action
    :param log_std_init: Logarithm of the initial standard deviation. ``None``: that of 0.4 times half the range of each
        action, so that few are clipped; 0 for unbounded actions and for gSDE, as in SB3. The initial mean is the middle of
        the range, or 0
    :raises ValueError: If the standard deviation cannot depend on the observation, or an argument of it makes no sense
    """

    #: Masks of the actions that ``predict`` is asked for
    _action_masks: th.Tensor | None = None

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        state_dependent_std: bool = False,
        std_net_arch: list[int] | None = None,
        min_std: float = 1e-6,
        log_std_init: float | None = None,
        **kwargs: Any,
    ):
        if isinstance(observation_space, spaces.Dict) and "features_extractor_class" not in kwargs:
            raise ValueError(f"You must use `MultiInputPolicy` with a dict observation space, not {type(self).__name__}")
        if kwargs.get("optimizer_class", th.optim.Adam) is th.optim.Adam and kwargs.get("optimizer_kwargs") is None:
            kwargs["optimizer_kwargs"] = OPTIMIZER_KWARGS.copy()
        self.fits_std = log_std_init is None
        self.state_dependent_std = state_dependent_std
        self.std_net_arch = std_net_arch
        self.min_std = min_std
        super().__init__(observation_space, action_space, lr_schedule, log_std_init=log_std_init or 0.0, **kwargs)

    def _check_std_arguments(self) -> None:
        if self.state_dependent_std and not isinstance(self.action_dist, DiagGaussianDistribution):
            raise ValueError(
                "state_dependent_std=True needs a Box action space and use_sde=False, "
                f"not {self.action_space} with use_sde={self.use_sde}"
            )
        arch = self.std_net_arch
        if arch is not None and not (self.state_dependent_std and isinstance(arch, list) and arch):
            raise ValueError(
                f"std_net_arch={arch!r} must be a list of at least one layer, and needs state_dependent_std=True; "
                "None shares the trunk of the mean"
            )
        initial_std = np.exp(self._initial_gaussian()[1]).min() if self.state_dependent_std else 0.0
        if self.state_dependent_std and not (isinstance(self.min_std, float | int) and 0 < self.min_std < initial_std):
            raise ValueError(
                f"min_std={self.min_std!r} must be a number above 0 and below the initial standard deviation "
                f"exp(log_std_init)={initial_std:.3g}"
            )

    def _initial_gaussian(self) -> tuple[np.ndarray, np.ndarray]:
        mean, log_std = initial_gaussian(self.action_space)  # type: ignore[arg-type]
        return mean, log_std if self.fits_std else np.full_like(log_std, self.log_std_init)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            state_dependent_std=self.state_dependent_std,
            std_net_arch=self.std_net_arch,
            min_std=self.min_std,
            log_std_init=None if self.fits_std else self.log_std_init,
            # SB3 leaves this one out, and then loads another network than was saved
            share_features_extractor=self.share_features_extractor,
        )
        return data

    def _build_mlp_extractor(self) -> None:
        if self.std_net_arch is None:
            super()._build_mlp_extractor()
        else:
            self.mlp_extractor = TwoTrunkExtractor(
                self.std_net_arch,
                # An LSTM comes between the features and the trunks
                feature_dim=getattr(self, "lstm_output_dim", self.features_dim),
                net_arch=self.net_arch,
                activation_fn=self.activation_fn,
                device=self.device,
            )

    def _build(self, lr_schedule: Schedule) -> None:
        self._check_std_arguments()
        super()._build(lr_schedule)
        if not isinstance(self.action_dist, DiagGaussianDistribution):
            return
        mean, log_std = self._initial_gaussian()
        self.action_net.bias.data += th.as_tensor(mean, dtype=th.float32)  # type: ignore[operator]
        if not self.state_dependent_std:
            self.log_std.data = th.as_tensor(log_std, dtype=th.float32)
            return
        # The head takes the place of SB3's parameter, and the optimizer is made anew to hold it
        del self.log_std
        extractor = self.mlp_extractor
        latent_dim = extractor.latent_dim_std if isinstance(extractor, TwoTrunkExtractor) else extractor.latent_dim_pi
        self.std_net = nn.Linear(latent_dim, get_action_dim(self.action_space))
        if self.ortho_init:
            self.init_weights(self.std_net, gain=0.01)
        # softplus(bias) + min_std = exp(log_std)
        softplus = np.exp(log_std) - self.min_std
        self.std_net.bias.data = th.as_tensor(softplus + np.log(-np.expm1(-softplus)), dtype=th.float32)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Get the policy action from an observation (and optional hidden state).

        :param observation: The input observation
        :param state: The last hidden states of a policy with memory
        :param episode_start: Whether the observations start an episode, where hidden states are zero
        :param deterministic: Whether to take the likeliest action instead of a sample
        :param action_masks: Whether each action is valid, shape ``(n_envs, mask_size)``, see :mod:`sb3_reinforce.masks`
        :return: The action, and the next hidden states
        :raises ValueError: If the masks do not fit, or exclude all actions
        """
        if action_masks is not None:
            layout = MaskLayout(self.action_space)
            masks = layout.check(action_masks, max(1, np.size(action_masks) // layout.size))
            self._action_masks = th.as_tensor(masks, device=self.device)
        try:
            return super().predict(observation, state, episode_start, deterministic)
        finally:
            self._action_masks = None

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        if self._action_masks is not None and len(self._action_masks) != len(latent_pi):
            raise ValueError(f"{len(self._action_masks)} action masks were given for {len(latent_pi)} observations")
        if not self.state_dependent_std:
            return mask_distribution(super()._get_action_dist_from_latent(latent_pi), self._action_masks)
        latent_mean = latent_std = latent_pi
        if self.std_net_arch is not None:
            latent_mean, latent_std = latent_pi.tensor_split([self.mlp_extractor.latent_dim_pi], dim=1)
        std = F.softplus(self.std_net(latent_std)) + self.min_std
        assert isinstance(self.action_dist, DiagGaussianDistribution)
        return self.action_dist.proba_distribution(self.action_net(latent_mean), std.log())


class ReinforceCnnPolicy(ReinforcePolicy):
    """
    A :class:`ReinforcePolicy` for images.

    :param features_extractor_class: Features extractor to use
    """

    def __init__(self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN, **kwargs: Any):
        super().__init__(*args, features_extractor_class=features_extractor_class, **kwargs)


class ReinforceMultiInputPolicy(ReinforcePolicy):
    """
    A :class:`ReinforcePolicy` for dict observations.

    :param features_extractor_class: Features extractor to use
    """

    def __init__(self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor, **kwargs: Any):
        super().__init__(*args, features_extractor_class=features_extractor_class, **kwargs)


MlpPolicy = ReinforcePolicy
CnnPolicy = ReinforceCnnPolicy
MultiInputPolicy = ReinforceMultiInputPolicy
