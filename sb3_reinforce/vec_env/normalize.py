"""Helpers for SB3's ``VecNormalize`` among the wrappers of a vectorized environment."""

from collections.abc import Iterator

from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize


def wrappers(env: VecEnv) -> Iterator[VecEnv]:
    """
    Iterate over the wrappers of a vectorized environment, from the outside to the inside.

    :param env: A vectorized environment
    :return: The environment itself, and each that it wraps
    """
    while isinstance(env, VecEnvWrapper):
        yield env
        env = env.venv
    yield env


def statistics_of(normalizer: VecNormalize) -> dict[str, RunningMeanStd]:
    """
    Collect the running statistics of the observations.

    :param normalizer: A wrapper that normalizes
    :return: Statistics by the keys of the observations, ``""`` for an observation that is no dict
    """
    obs_rms = normalizer.obs_rms if normalizer.norm_obs else {}
    return obs_rms if isinstance(obs_rms, dict) else {"": obs_rms}


def running_statistics(env: VecEnv) -> list[RunningMeanStd]:
    """
    Collect all running statistics of a vectorized environment.

    :param env: A vectorized environment
    :return: Statistics of observations and returns
    """
    normalizers = [wrapper for wrapper in wrappers(env) if isinstance(wrapper, VecNormalize)]
    return [rms for wrapper in normalizers for rms in (*statistics_of(wrapper).values(), wrapper.ret_rms)]
