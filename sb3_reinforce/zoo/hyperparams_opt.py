"""The search for hyperparameters of REINFORCE, as RL Zoo does it for its algorithms."""

import math
from typing import Any

import optuna
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

NET_ARCHS = {"linear": [], "tiny": [32], "small": [64, 64], "medium": [256, 256]}
LSTM_SIZES = [16, 32, 64, 128, 256]
ACTIVATION_FNS = {"tanh": nn.Tanh, "relu": nn.ReLU}


def target_kl_schedule(initial_value: float) -> LinearSchedule:
    """
    Make a schedule for the target of the KL divergence.

    :param initial_value: Where the target starts
    :return: A target that falls linearly to a hundredth of that over the run: at zero there would be no step
    """
    return LinearSchedule(initial_value, initial_value / 100, 1.0)


def sample_reinforce_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict) -> dict[str, Any]:
    """
    Sample hyperparameters of REINFORCE.

    :param trial: The trial to sample for, with the policy as a user attribute
    :param n_actions: Not used
    :param n_envs: Number of training environments: there is at least one episode per environment and update
    :param additional_args: Not used
    :return: Arguments of ``REINFORCE``
    """
    # From 2 (a baseline needs another episode) to 2**6=64
    fewest = max(1, math.ceil(math.log2(n_envs)))
    n_episodes_pow = trial.suggest_int("n_episodes_pow", fewest, max(fewest, 6))
    one_minus_gamma = trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True)
    trial.suggest_categorical("natural_gradient", [False, True])
    trial.suggest_float("learning_rate", 1e-4, 0.1, log=True)
    trial.suggest_float("initial_target_kl", 0.01, 1.0, log=True)
    trial.suggest_categorical("normalize_advantage", [False, True])
    if trial.suggest_categorical("baseline", ["leave_one_out", "timestep", "value"]) == "value":
        trial.suggest_float("one_minus_gae_lambda", 0.0001, 0.1, log=True)
        trial.suggest_int("n_value_epochs", 1, 20)
        trial.suggest_float("value_learning_rate", 1e-4, 1e-2, log=True)
    trial.suggest_categorical("net_arch", list(NET_ARCHS))
    trial.suggest_categorical("activation_fn", list(ACTIVATION_FNS))
    trial.suggest_float("log_std_init", -2.0, 0.5)
    if "Lstm" in trial.user_attrs.get("policy", ""):
        trial.suggest_categorical("lstm_hidden_size", LSTM_SIZES)
        trial.suggest_categorical("enable_critic_lstm", [False, True])

    # Display true values
    trial.set_user_attr("gamma", 1 - one_minus_gamma)
    trial.set_user_attr("n_episodes", 2**n_episodes_pow)
    return convert_reinforce_params(trial.params)


def convert_reinforce_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Convert the parameters of a trial to hyperparameters.

    :param sampled_params: The parameters of a trial of :func:`sample_reinforce_params`
    :return: Arguments of ``REINFORCE``
    """
    hyperparams = sampled_params.copy()
    hyperparams["n_episodes"] = 2 ** hyperparams.pop("n_episodes_pow")
    hyperparams["gamma"] = 1 - hyperparams.pop("one_minus_gamma")
    hyperparams["gae_lambda"] = 1 - hyperparams.pop("one_minus_gae_lambda", 0)
    hyperparams["target_kl"] = target_kl_schedule(hyperparams.pop("initial_target_kl"))
    hyperparams["policy_kwargs"] = {
        "net_arch": NET_ARCHS[hyperparams.pop("net_arch")],
        "activation_fn": ACTIVATION_FNS[hyperparams.pop("activation_fn")],
        "log_std_init": hyperparams.pop("log_std_init"),
        **{name: hyperparams.pop(name) for name in ("lstm_hidden_size", "enable_critic_lstm") if name in hyperparams},
    }
    return hyperparams
