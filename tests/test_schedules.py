"""Schedules go by the progress at the start of the batch."""

import pytest
from stable_baselines3.common.env_util import make_vec_env

from sb3_reinforce import REINFORCE
from tests.envs import CountEnv

N_STEPS = 20


def make_model(seen, **kwargs):
    def schedule(progress):
        seen.append(progress)
        return 0.01

    env = make_vec_env(lambda: CountEnv(5), seed=0)
    return REINFORCE("MlpPolicy", env, n_episodes=4, seed=0, target_kl=schedule, **kwargs)


def test_one_call():
    seen = []
    make_model(seen).learn(5 * N_STEPS)
    assert seen == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


def test_learning_in_pieces():
    """
    Calls that are one batch long, as SB3's users make them between evaluations: schedules fall over the calls, where the
    progress at the end of a batch would be 0 in each of them.
    """
    seen = []
    model = make_model(seen)
    for _ in range(5):
        model.learn(N_STEPS, reset_num_timesteps=False)
    assert seen == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])


def test_batch_beyond_the_end():
    """A schedule is not asked for what comes after its end."""
    seen = []
    make_model(seen).learn(N_STEPS + 1)
    assert seen == pytest.approx([1, 1 / 21])


def test_default_target_is_not_the_last_one_in_each_call():
    env = make_vec_env(lambda: CountEnv(5), seed=0)
    model = REINFORCE("MlpPolicy", env, n_episodes=4, seed=0)
    targets = []
    for _ in range(4):
        model.learn(N_STEPS, reset_num_timesteps=False)
        targets.append(model.target_kl(model._current_progress_remaining))
    assert targets == pytest.approx([0.05, 0.0275, 0.005 + 0.045 / 3, 0.005 + 0.045 / 4])
