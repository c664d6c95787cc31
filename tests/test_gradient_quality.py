"""``sb3-reinforce gradients``: its gradients are those of training, its numbers those of their definitions."""

import os

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import yaml
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnvWrapper

from sb3_reinforce import REINFORCE
from sb3_reinforce.compare.gradients import gradients
from sb3_reinforce.compare.gradients import make_env as make_gradient_env
from sb3_reinforce.compare.gradients import make_model as gradient_model
from sb3_reinforce.compare.plots import plot_gradients
from sb3_reinforce.compare.quality import ESTIMATORS, batch_gradients, collect, fit_critic, measure, quality
from tests.envs import CountEnv, SpacesEnv
from tests.helpers import PLAIN, gradient_of
from tests.test_dict_env import CELL, VECTOR
from tests.test_dict_env import make_env as make_dict_env
from tests.zoo_command import run, succeed

#: Baselines are also tried with returns that they are not made for
pytestmark = pytest.mark.filterwarnings("ignore:baseline=.* estimates the reward-to-go")


class VecEqualReward(VecEnvWrapper):
    """Every step is worth 0.1."""

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        observation, rewards, dones, infos = self.venv.step_wait()
        return observation, np.full_like(rewards, 0.1), dones, infos


def make_model(env_id="CartPole-v1", **kwargs):
    kwargs = {**PLAIN, "seed": 0, "policy_kwargs": dict(net_arch=[8]), **kwargs}
    return REINFORCE("MlpPolicy", make_vec_env(env_id, seed=0), **kwargs)


def gradient_of_training(model, estimator):
    """Return what training takes for the gradient of all episodes in the buffer."""
    model.returns, model.baseline = estimator
    model.normalize_advantage = False
    gradient = gradient_of(model)
    return -np.concatenate([np.ravel(gradient[name]) for name in gradient if "value_net" not in name])


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("discount_states", [False, True])
@pytest.mark.filterwarnings("ignore:No step has been made")
def test_gradients_are_those_of_training(env_id, discount_states):
    model = make_model(env_id, discount_states=discount_states, gamma=0.9)
    fit_critic(model, 4)
    collect(model, 6)
    (found,) = batch_gradients(model, 6)
    assert len(found) == len(ESTIMATORS) == 12
    for estimator, gradient in zip(ESTIMATORS, found, strict=True):
        expected = gradient_of_training(model, estimator)
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-4 * abs(expected).max(), err_msg=str(estimator))


@pytest.mark.parametrize(
    "policy, env, policy_kwargs",
    [
        ("MultiInputPolicy", make_dict_env(vector=VECTOR, cell=CELL), {}),
        ("MlpPolicy", make_vec_env(CountEnv), dict(state_dependent_std=True)),
        ("MlpLstmPolicy", make_vec_env(CountEnv), dict(lstm_hidden_size=4)),
    ],
)
def test_other_policies(policy, env, policy_kwargs):
    model = REINFORCE(policy, env, seed=0, policy_kwargs=dict(net_arch=[8], **policy_kwargs))
    collect(model, 4)
    estimator = ("reward_to_go", "leave_one_out")
    ((gradient,),) = batch_gradients(model, 4, [estimator])
    np.testing.assert_allclose(gradient, gradient_of_training(model, estimator), rtol=1e-3, atol=1e-5)


def test_batches_are_independent_and_in_order():
    """The gradients of two batches average to that of both, without a baseline."""
    model = make_model()
    collect(model, 8)
    ((whole,),) = batch_gradients(model, 8, [("episode", None)])
    halves = np.concatenate(list(batch_gradients(model, 4, [("episode", None)])))
    assert halves.shape == (2, len(whole))
    np.testing.assert_allclose(halves.mean(axis=0), whole, rtol=1e-3, atol=1e-4 * abs(whole).max())
    assert np.abs(halves[0] - halves[1]).max() > 1e-3


def quality_of_one(gradients, n_episodes):
    """
    :param gradients: Gradients of one estimator, shape ``(n_batches, n_parameters)``
    """
    return {key: float(value[0]) for key, value in quality(np.asarray(gradients)[:, None], n_episodes).items()}


def test_closed_forms():
    found = quality_of_one([[3.0], [1.0]], n_episodes=4)
    # mean 2, variance 2, |G|^2 = 4 - 2/2
    assert found == {"n_batches": 2, "variance": 2.0, "snr": 1.5, "cosine": 1.0, "noise_scale": 4 / 1.5}
    found = quality_of_one(np.eye(2), n_episodes=4)
    assert (found["variance"], found["cosine"]) == (1.0, 0.0) and np.isnan(found["snr"]) and np.isnan(found["noise_scale"])
    found = quality_of_one(np.ones((3, 2)), n_episodes=4)
    assert found["snr"] == np.inf and found["noise_scale"] == 0.0 and found["cosine"] == pytest.approx(1)
    assert quality_of_one([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], 2)["cosine"] == pytest.approx(-1 / 3)
    nothing = quality_of_one(np.zeros((3, 2)), 2)
    assert (nothing["variance"], nothing["cosine"]) == (0.0, 0.0) and np.isnan(nothing["snr"])
    # Several estimators at once
    both = quality(np.array([[[3.0], [1.0]], [[1.0], [1.0]]]), 4)
    assert both["snr"].tolist() == [1.5, np.inf]


def test_signal_is_unbiased():
    """On made-up gradients of known expectation and covariance: E[variance] = 3, |G|^2 = 1/4."""
    rng = np.random.default_rng(0)
    expectation = np.array([0.3, -0.4, 0.0])
    n_batches, n_cases = 8, 4000
    samples = expectation + rng.normal(size=(n_batches, n_cases, 3))
    found = quality(samples, 2)
    assert found["variance"].mean() == pytest.approx(3, abs=4 * found["variance"].std() / np.sqrt(n_cases))
    # What the ratio is made of, where it is known
    signals = (samples.mean(axis=0) ** 2).sum(axis=1) - found["variance"] / n_batches
    known = signals > 0
    np.testing.assert_allclose((found["snr"] * found["variance"])[known], signals[known])
    assert np.isnan(found["snr"][~known]).all() and known.any() and not known.all()
    # With its bias, |mean|^2 would be 3/8 too large, which is more than forty standard errors
    error = signals.std() / np.sqrt(n_cases)
    assert signals.mean() == pytest.approx(0.25, abs=4 * error) and 3 / 8 > 40 * error


def test_noise_scale_does_not_depend_on_the_number_of_episodes():
    """Without a baseline the variance of a mean of n is 1/n of that of one: two estimates of the same number."""
    model = make_model()
    collect(model, 1024)
    few, many = (quality(batch_gradients(model, n, [("reward_to_go", None)]), n) for n in (2, 8))
    assert few["variance"][0] / many["variance"][0] == pytest.approx(4, rel=0.25)
    assert few["noise_scale"][0] == pytest.approx(many["noise_scale"][0], rel=0.35)


def test_solved_task():
    """Where all returns are equal there is nothing to learn, and nothing is said to be signal."""
    env = make_vec_env(lambda: CountEnv(rewarded=False))
    env = VecEqualReward(env)
    model = REINFORCE("MlpPolicy", env, seed=0, gamma=0.9, policy_kwargs=dict(net_arch=[8]))
    collect(model, 12)
    table = measure(model, [3]).set_index(["returns", "baseline"])
    for estimator in (("reward_to_go", "timestep"), ("episode", "leave_one_out")):
        assert table.loc[estimator, "variance"] == 0
        assert np.isnan(table.loc[estimator, "snr"])
    assert table.loc[("reward_to_go", "none"), "variance"] > 0


def test_picture_without_any_signal(tmp_path):
    """Few episodes can leave all signal-to-noise ratios unknown, which no logarithmic axis can show."""
    table = pd.DataFrame({"returns": ["episode"] * 2, "baseline": ["none"] * 2, "n_episodes": [2, 4], "variance": [0.0, 0.0]})
    plot_gradients(table.assign(snr=np.nan, cosine=0.0, noise_scale=np.nan), tmp_path, "Nothing")
    assert (tmp_path / "gradients.png").stat().st_size > 1000


def test_baselines():
    """In CartPole, whose returns are far from zero. The mean, with its own episode, shrinks the gradient by 1 - 1/n."""
    model = make_model()
    fit_critic(model, 200)
    collect(model, 400)
    table = measure(model, [8]).set_index(["returns", "baseline"])
    variance, snr = table["variance"]["episode"], table["snr"]["episode"]
    assert variance["leave_one_out"] < 0.5 * variance["none"] and snr["leave_one_out"] > 2 * snr["none"]
    assert variance["mean"] == pytest.approx((7 / 8) ** 2 * variance["leave_one_out"], rel=1e-4)
    assert snr["mean"] == pytest.approx(snr["leave_one_out"], rel=1e-4)
    variance = table["variance"]["reward_to_go"]
    assert variance["value"] < variance["timestep"] < variance["none"]


def test_command(tmp_path):
    """On a run of RL Zoo with normalized observations, and on a fresh policy."""
    train = ("train", "--algo", "reinforce", "--env", "Pendulum-v1", "-n", 400, "--eval-freq", -1, "-f", tmp_path)
    succeed(tmp_path, *train, "-params", "normalize:True", "time_limit:'bootstrap'")
    model = tmp_path / "reinforce/Pendulum-v1_1/Pendulum-v1.zip"
    options = ("-n", 16, "--batch-sizes", 2, 4, "--seed", 3)
    output = succeed(tmp_path, "gradients", "--model", model, *options, "--out", tmp_path / "trained")
    assert "Gradient estimates of Pendulum-v1.zip in Pendulum-v1" in output
    table = pd.read_csv(tmp_path / "trained/gradients.csv", keep_default_na=False)
    assert len(table) == 2 * len(ESTIMATORS) and list(table["n_batches"].unique()) == [8, 4]
    assert (tmp_path / "trained/gradients.png").stat().st_size > 1000
    first = (tmp_path / "trained/gradients.csv").read_bytes()
    succeed(tmp_path, "gradients", "--model", model, *options, "--out", tmp_path / "trained")
    assert (tmp_path / "trained/gradients.csv").read_bytes() == first
    assert len(list((model.parent).glob("**/events.*"))) == 0
    chosen = ("--estimators", "reward_to_go:timestep", "episode:none")
    output = succeed(tmp_path, "gradients", "--env", "CartPole-v1", *options, *chosen, "--out", tmp_path / "fresh")
    table = pd.read_csv(tmp_path / "fresh/gradients.csv", keep_default_na=False)
    assert set(zip(table["returns"], table["baseline"], strict=True)) == {("reward_to_go", "timestep"), ("episode", "none")}
    assert "a fresh policy in CartPole-v1" in output and "the highest signal-to-noise ratio without bias is that of" in output


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "--model or --env is required"),
        (("--model", "nowhere.zip"), "--model nowhere.zip must be the path of a .zip file"),
        (("--env", "CartPole-v9"), "'CartPole-v9' is no environment, did you mean 'CartPole-v"),
        (("--env", "CartPole-v1", "--batch-sizes", "1"), "batch_sizes=1 must be an integer in [2, 128]"),
        (("--env", "CartPole-v1", "--out", os.devnull), f"--out {os.devnull} must be a folder"),
        (("--env", "CartPole-v1", "-n", "16", "--batch-sizes", "9"), "batch_sizes=9 must be an integer in [2, 8]"),
        (("--env", "CartPole-v1", "--estimators", "episode:value"), r"estimator=('episode', 'value') must be one of ("),
        (("--env", "CartPole-v1", "-n", "3"), "n_episodes=3 must be an integer in [4, inf)"),
    ],
)
def test_bad_input(tmp_path, arguments, message):
    status, _, errors = run(
        tmp_path, "gradients", "--out", tmp_path / "out", *arguments, program=("-W", "ignore", "-m", "sb3_reinforce")
    )
    assert status in (1, 2) and message in errors and len(errors.strip().splitlines()) == 1, errors
    assert not (tmp_path / "out").exists()


def test_discarded_episodes(tmp_path):
    model = make_model("Pendulum-v1", time_limit="discard")
    model.save(tmp_path / "Pendulum-v1")
    with pytest.raises(ValueError, match="time_limit='discard' leaves out episodes"):
        gradients(tmp_path / "out", tmp_path / "Pendulum-v1.zip")


@pytest.mark.parametrize("of_entry, of_command, expected", [(True, None, True), (True, False, False), (None, True, True)])
def test_environment_is_that_of_the_training(tmp_path, of_entry, of_command, expected):
    """With the arguments of the entry, or those of the command line in their place."""
    (tmp_path / "CartPole-v1").mkdir()
    for name, value in (("config", of_entry), ("args", of_command)):
        env_kwargs = None if value is None else {"sutton_barto_reward": value}
        (tmp_path / "CartPole-v1" / f"{name}.yml").write_text(yaml.dump({"env_kwargs": env_kwargs}))
    env = make_gradient_env(tmp_path / "CartPole-v1.zip", "CartPole-v1", 0)
    assert env.unwrapped.envs[0].unwrapped._sutton_barto_reward == expected


@pytest.mark.parametrize(
    "observation, policy", [(spaces.Dict(a=spaces.Discrete(3)), "MultiInputPolicy"), (spaces.Discrete(3), "MlpPolicy")]
)
def test_fresh_policy_fits_the_observations(observation, policy):
    gym.register("Observing-v0", lambda **kwargs: SpacesEnv(observation, spaces.Discrete(2)))
    try:
        assert type(gradient_model(None, "Observing-v0", 0).policy) is REINFORCE.policy_aliases[policy]
    finally:
        del gym.registry["Observing-v0"]


def test_number_of_episodes_is_the_one_asked_for():
    """Whatever ``target_steps`` the model was trained with."""
    model = make_model("Pendulum-v1", n_episodes=2, target_steps=1000).learn(1)
    collect(model, 3)
    assert model.rollout_buffer.n_episodes == 3
