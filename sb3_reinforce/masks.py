"""
Invalid-action masks: where they come from, and what they do to a distribution of actions.

A mask says of each action whether it is valid, in the layout of sb3_contrib's ``MaskablePPO``: ``n`` entries for
``Discrete(n)``, ``sum(nvec)`` for ``MultiDiscrete(nvec)``, and for ``MultiBinary(n)`` two entries for each number, which say
whether it may be 0 and whether it may be 1.

Environments offer masks in one of three ways: by a method ``action_masks()`` (sb3_contrib's protocol, also by its wrapper
``ActionMasker``), by ``info["action_mask"]`` (Gymnasium's Taxi) or by the key ``action_mask`` of dict observations
(PettingZoo, EnvPool).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.distributions import MaskableDistribution
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    Distribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch.distributions import Bernoulli, Categorical

#: Name of the method, and of the key of infos and observations
METHOD, KEY = "action_masks", "action_mask"

#: The ways in which environments offer masks
MASK_SOURCES = {
    "observation": f"the key {KEY!r} of the observations",
    "method": f"the method {METHOD} of the environment",
    "info": f"the key {KEY!r} of the infos",
    None: "none",
}

#: Logit of an invalid action, whose probability is then exactly zero in single precision. As in sb3_contrib
INVALID = -1e8


class MaskLayout:
    """
    How the masks of a space of actions are divided into choices, each of which needs a valid action.

    :param action_space: Action space
    :raises ValueError: If the actions cannot be masked
    """

    def __init__(self, action_space: spaces.Space):
        #: Number of actions of each choice
        self.parts: list[int]
        if isinstance(action_space, spaces.Discrete):
            self.parts = [int(action_space.n)]
        elif isinstance(action_space, spaces.MultiDiscrete):
            self.parts = [int(n) for n in action_space.nvec]
        elif isinstance(action_space, spaces.MultiBinary):
            self.parts = [2] * int(np.prod(action_space.shape))
        else:
            raise ValueError(
                f"Actions of {action_space} cannot be masked, only those of Discrete, MultiDiscrete and MultiBinary: "
                "use_masking=False ignores the masks of the environment"
            )
        self.action_space = action_space
        #: Size of a mask
        self.size = sum(self.parts)
        #: Column of the first action of each choice
        self.starts = np.cumsum([0, *self.parts[:-1]])

    def check(self, masks: Any, n_envs: int) -> np.ndarray:
        """
        Check the masks of some environments.

        :param masks: Their masks
        :param n_envs: Number of environments
        :return: The masks, shape ``(n_envs, mask_size)``
        :raises ValueError: If they have another shape or other values than 0 and 1, or no action of a choice is valid
        """
        try:
            given = np.asarray(masks)
        except ValueError as error:
            needed = f"{self.action_space} needs {(n_envs, self.size)}, the choices of each environment end to end"
            raise ValueError(f"Action masks are of unlike shapes, and {needed}") from error
        if given.size != n_envs * self.size:
            raise ValueError(f"Action masks have shape {given.shape}, {self.action_space} needs {(n_envs, self.size)}")
        given = given.reshape(n_envs, self.size)
        valid = given
        if given.dtype != bool:
            valid = given.astype(bool)
            if not np.array_equal(given, valid):
                hint = "VecNormalize(norm_obs_keys=...) lists the keys to normalize, all but action_mask"
                raise ValueError(f"Action masks hold other numbers than 0 and 1: {given[0]}. {hint}")
        # As bytes, whose maximum NumPy finds faster
        has_valid = np.maximum.reduceat(valid.view(np.uint8), self.starts, axis=1)
        if np.count_nonzero(has_valid) < has_valid.size:
            env_idx, part = np.argwhere(has_valid == 0)[0]
            choice = f" for choice {part}" if len(self.parts) > 1 else ""
            raise ValueError(f"No action is valid{choice} in environment {env_idx}: its mask is {given[env_idx]}")
        return valid

    def check_actions(self, actions: np.ndarray, masks: np.ndarray) -> None:
        """
        Check that actions are valid.

        :param actions: Actions, shape ``(n_steps, action_dim)``
        :param masks: Whether each action was valid, shape ``(n_steps, mask_size)``
        :raises ValueError: If a mask excludes the action that was taken
        """
        is_valid = np.take_along_axis(masks, self.starts + actions.astype(int), axis=1)
        if not is_valid.all():
            step = np.argwhere(~is_valid)[0, 0]
            raise ValueError(
                f"The policy has taken the action {actions[step]}, which its mask {masks[step].astype(int)} excludes"
            )


def find_source(env: VecEnv) -> str | None:
    """
    Find out how an environment offers masks.

    :param env: A vectorized environment, after a reset
    :return: ``"observation"``, ``"method"``, ``"info"``, or ``None`` if it offers none
    """
    if isinstance(env.observation_space, spaces.Dict) and KEY in env.observation_space.spaces:
        return "observation"
    if env.has_attr(METHOD):
        return "method"
    return "info" if any(KEY in info for info in env.unwrapped.reset_infos) else None


class ActionMasks:
    """
    Read the masks of a vectorized environment.

    :param env: The environment
    :param source: Where the masks come from, see :func:`find_source`
    """

    def __init__(self, env: VecEnv, source: str):
        self._env, self._source, self.layout = env, source, MaskLayout(env.action_space)
        # Looked up once, not in each step
        is_local = source == "method" and isinstance(env.unwrapped, DummyVecEnv)
        self._methods = [each.get_wrapper_attr(METHOD) for each in env.unwrapped.envs] if is_local else None  # type: ignore[attr-defined]

    def __call__(self, obs: Any, dones: np.ndarray, infos: Sequence[dict[str, Any]]) -> np.ndarray:
        """
        Read the masks of the next actions.

        :param obs: The observations to act on
        :param dones: Whether they start an episode, shape ``(n_envs,)``
        :param infos: Infos of the last step
        :return: Whether each action is valid, shape ``(n_envs, mask_size)``
        :raises ValueError: If a mask is missing, has another shape or other values than 0 and 1, or excludes all actions
        """
        env = self._env
        if self._source == "observation":
            masks = obs[KEY]
        elif self._source == "info":
            # Vectorized environments reset by themselves, and keep the infos of resets apart
            current = [env.unwrapped.reset_infos[i] if dones[i] else infos[i] for i in range(env.num_envs)]
            missing = [i for i, info in enumerate(current) if KEY not in info]
            if missing:
                raise ValueError(f"Environment {missing[0]} has left out the action_mask of its info, which it gave before")
            masks = [info[KEY] for info in current]
        elif self._methods is None:
            masks = env.env_method(METHOD)
        else:
            masks = [method() for method in self._methods]
        return self.layout.check(masks, env.num_envs)


def mask_distribution(distribution: Distribution, masks: th.Tensor | None) -> Distribution:
    """
    Take the probability of invalid actions away from a distribution.

    :param distribution: Distribution of the actions of each step, which is changed
    :param masks: Whether each action is valid, shape ``(n_steps, mask_size)``, ``None`` for no change
    :return: The same distribution
    :raises ValueError: If it is of a kind that cannot be masked
    """
    if masks is None:
        return distribution
    if isinstance(distribution, MaskableDistribution):
        distribution.apply_masking(masks)
    elif isinstance(distribution, CategoricalDistribution):
        distribution.distribution = _masked(distribution.distribution, masks)
    elif isinstance(distribution, MultiCategoricalDistribution):
        parts = masks.split([int(n) for n in distribution.action_dims], dim=1)
        distribution.distribution = [_masked(*pair) for pair in zip(distribution.distribution, parts, strict=True)]
    elif isinstance(distribution, BernoulliDistribution):
        may_be_0, may_be_1 = masks.view(len(masks), -1, 2).unbind(dim=2)
        logits = distribution.distribution.logits
        logits = th.where(may_be_0, th.where(may_be_1, logits, INVALID), -INVALID)
        distribution.distribution = Bernoulli(logits=logits)
    else:
        raise ValueError(f"{type(distribution).__name__} cannot be masked: use_masking=False ignores masks")
    return distribution


def _masked(distribution: Categorical, masks: th.Tensor) -> Categorical:
    return Categorical(logits=th.where(masks, distribution.logits, INVALID))


class MaskedModel:
    """
    A model that reads the masks of the environment in which it is evaluated: ``evaluate_policy(MaskedModel(model, env), env)``
    for SB3's ``evaluate_policy``. All but ``predict`` is that of the model, also what is set.

    :param model: A model whose ``predict`` takes ``action_masks``
    :param env: The vectorized environment that its actions are for
    """

    _is_known: bool
    _masks: ActionMasks | None
    _resets: list[Any]

    def __init__(self, model: Any, env: VecEnv):
        # Where the masks come from can be told after a reset
        own = {"_model": model, "_env": env, "_is_known": False, "_masks": None, "_resets": [None] * env.num_envs}
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        if name == "_model":  # Of a copy that is being made
            raise AttributeError(name)
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            super().__setattr__(name, value)
        else:
            setattr(self._model, name, value)

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Any]:
        """
        Predict actions of the environment, as the model does.

        :param observation: Its observations
        :param state: What the model remembers
        :param episode_start: Whether the observations start an episode
        :param deterministic: Whether to take the likeliest action
        :param action_masks: Masks, ``None`` for those of the environment
        :return: Actions, and what the model remembers now
        """
        if action_masks is None:
            if not self._is_known:
                self._is_known, source = True, find_source(self._env)
                self._masks = ActionMasks(self._env, source) if source else None
                if source == "info" and not isinstance(self._env.unwrapped, DummyVecEnv):
                    raise ValueError("An evaluation finds the masks of infos in a DummyVecEnv, or else needs action_masks()")
            if self._masks is not None:
                # SB3's evaluate_policy tells of the ends of some episodes only, and resets without a word
                resets = list(self._env.unwrapped.reset_infos)
                dones = np.array([info is not before for info, before in zip(resets, self._resets, strict=True)])
                self._resets = resets
                action_masks = self._masks(observation, dones, getattr(self._env.unwrapped, "buf_infos", []))
        return self._model.predict(observation, state, episode_start, deterministic, action_masks=action_masks)


def of_environment(model: Any, env: VecEnv) -> Any:
    """
    Let a model go by the masks of the environment in which it is evaluated, if it has learned with masks.

    :param model: A model of any algorithm
    :param env: The vectorized environment that its actions are for
    :return: The model, or a :class:`MaskedModel`
    """
    return MaskedModel(model, env) if getattr(model, "mask_source", None) else model
