"""The step: taken back as a whole, or made as far as the KL divergence allows."""

import numpy as np
import pytest
from gymnasium import spaces

from sb3_reinforce import REINFORCE
from sb3_reinforce.line_search import PolicyStep, adapt_learning_rate
from tests.envs import CountEnv, SpacesEnv
from tests.helpers import PLAIN, assert_same, logged, state_of
from tests.helpers import make_model as make_any_model


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
@pytest.mark.parametrize("name", ["target_kl", "value_learning_rate", "ent_coef"])
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


class Scaled(CountEnv):
    """Whose rewards are multiplied by a number that can be changed."""

    scale = 1.0

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, self.scale * reward, *rest


def learn_scaled(scales, truncate=True, **kwargs):
    """Make a batch for each scale of the rewards, and return the logs of all, with the factor of Adam's learning rate."""
    env = Scaled(truncate=truncate)
    kwargs = {"normalize_advantage": True, "target_kl": 1e-4, "n_episodes": 50, "cg_damping": 1e-3, **kwargs}
    model = make_any_model(env, **{"baseline": "value", "time_limit": "bootstrap", **kwargs})
    logs = []
    for i, env.scale in enumerate(scales):
        factor = model._kl_learning_rate_factor
        model.learn(1, reset_num_timesteps=i == 0)
        logs.append({**logged(model), "factor": factor})
    return model, logs


@pytest.mark.parametrize("natural_gradient", [True, False])
def test_smaller_advantages_make_a_shorter_step(natural_gradient):
    scales = [1.0] * 5 + [0.1, 1.0, 10.0]
    model, logs = learn_scaled(scales, natural_gradient=natural_gradient)
    column = {name: np.array([log.get(name, np.nan) for log in logs]) for name in logs[0]}
    variances = column["train/advantage_std"] ** 2
    # All batches have as many steps
    expected = np.sqrt(variances / (np.cumsum(variances) / np.arange(1, len(scales) + 1)))
    ratios = column["train/advantage_ratio"]
    np.testing.assert_allclose(ratios, expected, rtol=1e-5)
    assert ratios[5] < 0.5 and ratios[7] > 2
    shares = np.minimum(1, ratios)
    if natural_gradient:
        np.testing.assert_allclose(column["train/approx_kl"], 1e-4 * shares**2, rtol=0.15, atol=1e-7)
    else:
        rates = model.learning_rate * column["factor"] * shares
        np.testing.assert_allclose(column["train/learning_rate"], rates, rtol=1e-5)
        # The factor itself does not follow a single small batch further than it follows any
        assert 0.5 <= model._kl_learning_rate_factor / logs[-1]["factor"] <= 1.5


@pytest.mark.parametrize("kwargs", [dict(normalize_advantage=False), dict(time_limit="terminal"), dict(truncate=False)])
def test_where_the_target_alone_is_the_length(kwargs):
    """Advantages that are not normalized, or differences between real returns."""
    _, logs = learn_scaled([1.0, 0.01], natural_gradient=True, **kwargs)
    assert logs[1]["train/approx_kl"] == pytest.approx(1e-4, rel=0.3)


@pytest.mark.parametrize("natural_gradient", [True, False])
def test_returns_that_are_all_the_same(natural_gradient):
    """The errors of a critic are no reason to move far: not after other rewards, nor where there has never been one."""
    _, logs = learn_scaled([1.0] * 3 + [0.0] * 5, truncate=False, natural_gradient=natural_gradient)
    ratios = np.array([log["train/advantage_ratio"] for log in logs[3:]])
    assert (ratios < 0.8).all() and logs[-1]["train/return_std"] == 0.0
    if natural_gradient:
        found = [log["train/approx_kl"] for log in logs[3:]]
        np.testing.assert_allclose(found, 1e-4 * ratios**2, rtol=0.3, atol=1e-7)
    with pytest.warns(UserWarning, match="the first 10 updates had the same return, 0"):
        _, logs = learn_scaled([0.0] * 20, truncate=False, natural_gradient=natural_gradient)
    assert logs[-1]["train/approx_kl"] < 0.01 * logs[0]["train/approx_kl"]


def test_learn_forgets_earlier_advantages():
    model, _ = learn_scaled([1.0, 0.01])
    model.learn(1)
    assert logged(model)["train/advantage_ratio"] == pytest.approx(1)
