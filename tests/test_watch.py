"""Training that has stopped learning says so, once."""

import warnings

import numpy as np
import pytest
from gymnasium import spaces

import benchmarks.tasks
from sb3_reinforce import REINFORCE
from sb3_reinforce.watch import PATIENCE, Watch
from tests.envs import CountEnv
from tests.helpers import PLAIN, logged

#: An update of a discrete policy that learns
FINE = dict(return_mean=3.0, return_std=1.0, explained_variance=0.5, entropy_loss=-0.5, grad_norm=1.0)
FINE["is_line_search_success"] = 1.0

STUCK = dict(return_mean=2.0, return_std=0.0)


def look(*updates, n_steps=100, is_discrete=True):
    """Return the first words of the warnings about updates, each of them seen so many times in a row."""
    watch = Watch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for times, changes in updates:
            for _ in range(times):
                watch.look(FINE | changes, n_steps, is_discrete)
    return [str(warning.message).split(":")[0].split(",")[0] for warning in caught]


EQUAL = f"All episodes of the first {PATIENCE} updates had the same return"
DETERMINISTIC = "The policy has become deterministic"
NO_GRADIENT = f"The gradient has been exactly zero for {PATIENCE} updates"
BASELINE = "The baseline predicts the returns worse than a constant would"
NO_STEP = f"No step has been made for {PATIENCE} updates"


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, []),
        (STUCK, [EQUAL]),
        # Less than one action in 100 is another one, and the returns are still different
        (dict(entropy_loss=-0.009), [DETERMINISTIC]),
        (dict(entropy_loss=-0.011), []),
        (dict(explained_variance=-1.1), [BASELINE]),
        (dict(explained_variance=-0.9), []),
        (dict(explained_variance=np.nan), []),
        (dict(explained_variance=-400.0, return_std=0.02), []),
        (dict(is_line_search_success=0.0), [NO_STEP]),
        (dict(grad_norm=0.0), [NO_GRADIENT]),
    ],
)
def test_signs(changes, expected):
    assert look((PATIENCE - 1, changes), (1, {})) == []
    assert look((PATIENCE, changes), (3 * PATIENCE, changes)) == expected


def test_a_row_starts_again():
    bad = dict(explained_variance=-2.0)
    assert look((PATIENCE - 1, bad), (1, {}), (PATIENCE - 1, bad)) == []
    assert look((PATIENCE - 1, bad), (1, {}), (PATIENCE, bad)) == [BASELINE]


@pytest.mark.parametrize("mean, expected", [(2.0, [NO_GRADIENT]), (3.0, []), (3.0 - 1e-7, []), (4.0, [])])
def test_equal_returns_are_a_solution_if_they_are_the_best(mean, expected):
    assert look((1, {}), (PATIENCE, STUCK | dict(return_mean=mean, grad_norm=0.0))) == expected


def test_a_solution_may_be_deterministic():
    solved = dict(return_std=0.0, entropy_loss=0.0)
    assert look((1, {}), (PATIENCE, solved)) == []
    assert look((1, {}), (PATIENCE, solved | dict(return_mean=2.9))) == [DETERMINISTIC]


def test_density_is_no_probability():
    """The entropy of a Gaussian can be below zero: it is deterministic when little is left of its standard deviation."""
    dense, shrunk = dict(entropy_loss=3.0), dict(entropy_loss=3.0, std=1.9e-3)
    assert look((PATIENCE, dense), is_discrete=False) == []
    assert look((1, dict(std=2.0)), (PATIENCE, shrunk), is_discrete=False) == [DETERMINISTIC]
    assert look((1, dict(std=1.8)), (PATIENCE, shrunk), is_discrete=False) == []


def warnings_of(env, total_timesteps, policy="MlpPolicy", **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = REINFORCE(policy, env, seed=0, **kwargs).learn(total_timesteps)
    return model, [str(warning.message) for warning in caught]


def test_the_collapse_that_was_silent():
    """The old default is certain of a wrong answer after a few updates of 8 episodes."""
    _, found = warnings_of(benchmarks.tasks.Parity(), 5000, **PLAIN)
    assert sum(DETERMINISTIC in text for text in found) == 1


def test_a_solved_task_is_no_news_to_a_loaded_model(tmp_path):
    """It remembers that returns have differed, and how good they were."""
    model, _ = warnings_of(benchmarks.tasks.Parity(), 1000)
    model.save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model", env=benchmarks.tasks.Parity())
    assert vars(loaded._watch) == vars(model._watch) != vars(Watch())


def test_nothing_to_learn():
    model, found = warnings_of(CountEnv(rewarded=False), 1000, n_episodes=8)
    assert logged(model)["train/return_std"] == 0
    assert sum(EQUAL in text for text in found) == 1


def test_no_false_alarm():
    class Easy(CountEnv):
        action_space = spaces.Discrete(2)

        def step(self, action):
            observation, _, *rest = super().step(np.ones(2))
            return observation, float(action), *rest

    model, found = warnings_of(Easy(), 20_000)
    assert logged(model)["train/return_mean"] > 4.8
    assert not found
