"""What the arguments of ``REINFORCE`` may be."""

import warnings
from typing import Any

import numpy as np
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

from sb3_reinforce.baselines import BASELINES
from sb3_reinforce.batch_policy import BatchMethods
from sb3_reinforce.buffers import EpisodeRolloutBuffer
from sb3_reinforce.checks import check_choice, check_number, check_schedule
from sb3_reinforce.returns import RETURNS

#: The arguments that are names, and the names they take.
CHOICES: dict[str, tuple[str | None, ...]] = {
    "returns": tuple(RETURNS),
    "baseline": (None, *BASELINES, "greedy", "value"),
    "reduction": ("episode", "step"),
    "time_limit": (None, "terminal", "bootstrap", "discard"),
}

#: Factor of the lambda-return where the critic can be used for it, and ``gae_lambda`` is not given.
DEFAULT_GAE_LAMBDA = 0.97

#: Baselines that are made for the reward-to-go.
OF_REWARD_TO_GO = ("timestep", "linear", "value")

#: Numbers of an observation that the linear baseline can do with: it solves for two weights of each, for every episode.
MAX_LINEAR_NUMBERS = 1000

#: Episodes that a baseline needs, where it needs more than one.
MIN_N_EPISODES: dict[str | None, int] = {"leave_one_out": 2, "timestep": 2, "linear": 2}

#: What takes the place of arguments of A2C and PPO, and of an earlier one.
HINTS = {
    "min_steps": "target_steps makes batches of short episodes larger",
    "n_steps": "a batch is n_episodes whole episodes, more where target_steps asks for it",
    "batch_size": "the policy takes one step per batch of n_episodes; the critic has value_batch_size",
    "n_epochs": "the policy takes one step per batch; the critic has n_value_epochs",
    "vf_coef": "the critic has an optimizer of its own, with value_learning_rate",
    "clip_range": "target_kl limits the step",
    "clip_range_vf": "the critic has an optimizer of its own, and normalize_value for the scale of its targets",
    "use_rms_prop": "policy_kwargs=dict(optimizer_class=...) chooses the optimizer, for natural_gradient=False",
    "rms_prop_eps": "policy_kwargs=dict(optimizer_kwargs=...) are the arguments of the optimizer",
}


def resolve_gae_lambda(gae_lambda: float | None, returns: str, baseline: str | None) -> float:
    """
    Find the factor of the lambda-return.

    :param gae_lambda: Argument ``gae_lambda``
    :param returns: Name of the return
    :param baseline: Name of the baseline
    :return: The factor, 1 for Monte Carlo
    """
    if gae_lambda is not None:
        return gae_lambda
    return DEFAULT_GAE_LAMBDA if (returns, baseline) == ("reward_to_go", "value") else 1.0


def check_arguments(model: Any) -> None:
    """
    Check the arguments of ``REINFORCE``, each on its own and together.

    :param model: A model, whose attributes are its arguments
    :raises ValueError: If an argument is not one of those allowed, or does not go with another one
    """
    check_spaces_and_buffer(model)
    for name, allowed in CHOICES.items():
        check_choice(name, getattr(model, name), allowed)
    check_number("gamma", model.gamma, 0, 1)
    check_number("gae_lambda", model.gae_lambda, 0, 1, or_none=True)
    for name in ("max_episode_steps", "n_value_epochs", "value_batch_size", "cg_max_steps"):
        check_number(name, getattr(model, name), 1, integer=True)
    check_number("target_steps", model.target_steps, 0, integer=True, or_none=True)
    check_number("cg_damping", model.cg_damping, 0)
    for name in ("learning_rate", "value_learning_rate", "ent_coef"):
        check_schedule(name, getattr(model, name))
    check_schedule("target_kl", model.target_kl, or_none=True)
    check_number("max_grad_norm", model.max_grad_norm, 0, or_none=True)
    check_number("n_episodes", model.n_episodes, 1, integer=True, or_none=True)
    name = f"With baseline={model.baseline!r}, n_episodes"
    check_number(name, model.n_episodes, MIN_N_EPISODES.get(model.baseline, 1), integer=True, or_none=True)
    check_number("group_size", model.group_size, 1, integer=True)
    if model.group_size > 1 or model.baseline == "greedy":
        check_groups(model)
    elif model.group_options is not None:
        raise ValueError("group_options is for episodes that share a start, group_size above 1 or baseline='greedy'")
    if model.time_limit == "bootstrap" and model.baseline != "value":
        raise ValueError(f"time_limit='bootstrap' needs the critic, baseline='value', not {model.baseline!r}")
    if (
        model.gae_lambda is not None
        and model.gae_lambda < 1
        and (model.baseline != "value" or model.returns != "reward_to_go")
    ):
        raise ValueError(
            f"gae_lambda={model.gae_lambda} < 1 needs baseline='value' and returns='reward_to_go', "
            f"not {model.baseline!r} and {model.returns!r}"
        )
    if model.returns != "reward_to_go" and model.baseline in OF_REWARD_TO_GO:
        warnings.warn(
            f"baseline={model.baseline!r} estimates the reward-to-go, not returns={model.returns!r}, which is the same at "
            "all times of an episode: baseline='leave_one_out' goes with it"
        )
    if model.env is not None:
        model._check_n_envs(model.env.num_envs)


def check_groups(model: Any) -> None:
    """
    Check the arguments of ``REINFORCE`` that go with episodes that share a start.

    :param model: A model, whose attributes are its arguments
    :raises ValueError: If they do not go together
    """
    size = model.group_size
    if model.n_episodes is not None and model.n_episodes % size:
        raise ValueError(f"n_episodes={model.n_episodes} must be a multiple of group_size={size}")
    if not (model.group_options is None or callable(model.group_options)):
        raise ValueError(f"group_options={model.group_options!r} must be a function of the seed, or None")
    if model.time_limit == "discard":
        raise ValueError("time_limit='discard' would leave groups without some of their episodes: take 'terminal'")
    if model.baseline in (None, "linear", "value"):
        warnings.warn(
            f"group_size={size} has no use for baseline={model.baseline!r}, which does not compare the episodes of a group: "
            "'timestep', 'leave_one_out', 'mean' and 'greedy' do"
        )


def check_spaces_and_buffer(model: Any) -> None:
    """
    Check what must fit the environment, and the classes of the policy and the rollout buffer.

    :param model: A model
    :raises ValueError: If something does not fit
    """
    buffer_class = model.rollout_buffer_class
    if buffer_class is not None and not (isinstance(buffer_class, type) and issubclass(buffer_class, EpisodeRolloutBuffer)):
        name = getattr(buffer_class, "__name__", repr(buffer_class))
        algorithm = "PPO" if hasattr(model, "clip_range") else "A2C, TRPO or another algorithm"
        hint = f": a saved model that has it is one of {algorithm}" if name in ("RolloutBuffer", "DictRolloutBuffer") else ""
        raise ValueError(f"rollout_buffer_class={name} must be an EpisodeRolloutBuffer{hint}")
    if issubclass(model.policy_class, RecurrentActorCriticPolicy) and not issubclass(model.policy_class, BatchMethods):
        raise ValueError(
            f"{model.policy_class.__name__} of sb3_contrib takes sequences that start anywhere in an episode: "
            "'MlpLstmPolicy', 'CnnLstmPolicy' and 'MultiInputLstmPolicy' take whole episodes, with the same arguments"
        )
    space = getattr(model, "action_space", None)  # Not without an environment
    if isinstance(space, spaces.MultiBinary | spaces.MultiDiscrete) and len(space.shape) > 1:
        raise ValueError(f"{space} has more than one dimension, which is not supported: flatten it")
    if model.baseline == "linear" and hasattr(model, "observation_space"):
        n_numbers = spaces.flatdim(model.observation_space)
        if n_numbers > MAX_LINEAR_NUMBERS:
            raise ValueError(
                f"baseline='linear' takes observations of at most {MAX_LINEAR_NUMBERS} numbers, and these have {n_numbers}: "
                "'value', 'timestep' and 'leave_one_out' take any"
            )
    if np.any(getattr(space, "start", 0) != 0):
        raise ValueError(
            f"The actions of {space} do not start at 0, which is not supported: SB3's policies sample numbers from 0 on. "
            "gymnasium.wrappers.TransformAction(env, lambda action: action + start, space from 0 on) shifts them"
        )
