"""The step: taken back as a whole, or made as far as the KL divergence allows."""

import numpy as np
import pytest
from gymnasium import spaces

from sb3_reinforce import REINFORCE
from sb3_reinforce.line_search import PolicyStep, adapt_learning_rate
from tests.envs import SpacesEnv
from tests.helpers import PLAIN, assert_same, state_of


def make_model(**kwargs):
    kwargs = {**PLAIN, "seed": 0, "n_episodes": 4, **kwargs}
    return REINFORCE("MlpPolicy", SpacesEnv(spaces.Box(-1, 1, (3,)), spaces.Discrete(3)), **kwargs)


@pytest.mark.parametrize("natural_gradient", [False, True])
@pytest.mark.parametrize("baseline", ["timestep", "value"])
def test_interrupted_step_leaves_nothing(natural_gradient, baseline, monkeypatch):
    """After Ctrl-C within a step, the model is that from before, with its critic: RL Zoo saves it then."""
    model = make_model(natural_gradient=natural_gradient, baseline=baseline).learn(1)
    before = state_of(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(PolicyStep, "kl", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.learn(1, reset_num_timesteps=False)
    assert_same(state_of(model), before)


@pytest.mark.parametrize("natural_gradient", [False, True])
def test_step_that_stays_too_long_is_not_made(natural_gradient, monkeypatch):
    """Twenty halvings are not enough: neither the parameters nor the optimizer are changed."""
    model = make_model(natural_gradient=natural_gradient).learn(1)
    before = state_of(model)
    calls = []
    monkeypatch.setattr(PolicyStep, "kl", lambda step: calls.append(1) or np.inf)
    model.learn(1, reset_num_timesteps=False)
    assert len(calls) == 21
    assert_same(state_of(model), before)


def test_first_step_is_taken_back_with_the_state_of_the_optimizer(monkeypatch):
    model = make_model()
    monkeypatch.setattr(PolicyStep, "kl", lambda step: np.nan)
    model.learn(1)
    assert model.policy.optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize(
    "value", [np.inf, -1.0, np.nan, lambda progress: np.inf, lambda progress: np.nan, lambda progress: -1]
)
@pytest.mark.parametrize("name", ["target_kl", "value_learning_rate"])
def test_targets_are_finite(name, value):
    with pytest.raises(ValueError, match=f"{name}=.*must be .*in \\[0(.0)?, inf\\)|Invalid learning rate"):
        make_model(baseline="value", **{name: value}).learn(1)


@pytest.mark.parametrize("name", ["learning_rate", "ent_coef", "cg_damping", "max_grad_norm"])
def test_numbers_are_finite(name):
    with pytest.raises(ValueError, match=f"{name}=inf must be a number in"):
        make_model(**{name: np.inf})


def test_learning_rate_follows_the_target():
    assert adapt_learning_rate(1.0, kl=0.1, target_kl=0.1, share=1.0) == pytest.approx(1)
    # The divergence grows with the square of the step
    assert adapt_learning_rate(2.0, kl=0.2, target_kl=0.1, share=1.0) == pytest.approx(2 * np.sqrt(0.5))
    assert adapt_learning_rate(1.0, kl=0.1, target_kl=0.1, share=0.25) == pytest.approx(0.25)
    # By no more than a factor of 1.5 up and 2 down, and a step that was not made halves it
    assert adapt_learning_rate(1.0, kl=1e-9, target_kl=0.1, share=1.0) == pytest.approx(1.5)
    assert adapt_learning_rate(1.0, kl=0.0, target_kl=0.1, share=0.0) == pytest.approx(0.5)
    assert adapt_learning_rate(1e3, kl=0.0, target_kl=0.1, share=1.0) == pytest.approx(1e3)


@pytest.mark.parametrize(
    "returns, baseline", [("episode", "timestep"), ("mean_reward_to_go", "timestep"), ("episode", "value")]
)
def test_baseline_that_does_not_go_with_the_return(returns, baseline):
    with pytest.warns(UserWarning, match=f"baseline={baseline!r} estimates the reward-to-go, not returns={returns!r}"):
        make_model(returns=returns, baseline=baseline)
