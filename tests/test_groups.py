"""Episodes that share a start."""

import re
from contextlib import nullcontext
from itertools import count
from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

from sb3_reinforce import REINFORCE
from sb3_reinforce.compare.gradients import gradients
from sb3_reinforce.compare.shared_starts import describe, start_share
from sb3_reinforce.quota import EpisodeQuota
from sb3_reinforce.sampler import NumpySampler, TorchSampler
from sb3_reinforce.vec_env.shared_starts import SharedStarts
from tests.helpers import logged, make_model

ACTION_SPACES = {
    "box": spaces.Box(-1, 1, (2,)),
    "discrete": spaces.Discrete(5),
    "multi-discrete": spaces.MultiDiscrete([2, 4, 3]),
    "multi-binary": spaces.MultiBinary(3),
}


class Lottery(gym.Env):
    """The start, the length of the episode and its prize are drawn at the reset, the rest of the noise later."""

    observation_space = spaces.Box(-1, 1, (2,), np.float64)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.start = self.np_random.uniform(-1, 1) if options is None else options["start"]
        self.remaining = int(self.np_random.integers(1, 6))
        return np.array([self.start, 0.0]), {}

    def step(self, action):
        self.remaining -= 1
        return np.array([self.start, self.np_random.uniform(-1, 1)]), 10 * self.start, self.remaining == 0, False, {}


class Lives(Lottery):
    ale = SimpleNamespace(lives=lambda: 3)


class Unseeded(Lottery):
    def reset(self, *, seed=None, options=None):
        return super().reset()


class NotFinite(Lottery):
    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return np.full_like(obs, np.nan), info


def learn(env, **kwargs):
    """Return the model after two updates in groups."""
    model = make_model(env, **{"n_episodes": 12, "group_size": 3, "learning_rate": 0.0, **kwargs})
    model.learn(1)
    return model.learn(1, reset_num_timesteps=False)


def starts_of(buffer):
    """Return the first observations of the episodes of each group."""
    observations = buffer.observations[buffer.episode_starts]
    return [observations[buffer.groups == group][:, 0] for group in range(buffer.n_groups)]


@pytest.mark.parametrize("n_envs", [1, 2, 5])
@pytest.mark.parametrize("kind", ["DummyVecEnv", "SubprocVecEnv", "VecNormalize", "VecFrameStack"])
def test_episodes_of_a_group_share_their_start(n_envs, kind):
    kwargs = dict(vec_env_cls=SubprocVecEnv, wrapper_class=SharedStarts) if kind == "SubprocVecEnv" else {}
    env = make_vec_env(Lottery, n_envs, **kwargs)
    if kind == "VecNormalize":
        env = VecNormalize(env, norm_obs=False)
    if kind == "VecFrameStack":
        env = VecFrameStack(env, 2)
    buffer = learn(env).rollout_buffer
    assert np.bincount(buffer.groups).tolist() == [3, 3, 3, 3] and buffer.n_groups == 4
    starts = starts_of(buffer)
    assert all(len(set(group)) == 1 for group in starts)
    if kind != "VecFrameStack":  # Which shows the frame before first
        assert len({group[0] for group in starts}) == 4
    # Their noise is that of the seed, too
    lengths = [set(buffer.lengths[buffer.groups == group]) for group in range(4)]
    assert all(len(group) == 1 for group in lengths)
    env.close()


def test_next_batch_has_other_starts_and_the_same_seed_the_same_ones():
    model = make_model(make_vec_env(Lottery, 2, seed=0), n_episodes=6, group_size=3, learning_rate=0.0)
    seen = [group[0] for _ in range(3) for group in starts_of(model.learn(1, reset_num_timesteps=False).rollout_buffer)]
    assert len(set(seen)) == 6
    again = make_model(make_vec_env(Lottery, 2, seed=0), n_episodes=6, group_size=3, learning_rate=0.0)
    assert [
        group[0] for _ in range(3) for group in starts_of(again.learn(1, reset_num_timesteps=False).rollout_buffer)
    ] == seen


def test_options_are_asked_for_once_in_a_group():
    numbers = count()
    starts = starts_of(learn(make_vec_env(Lottery, 2), group_options=lambda _: {"start": next(numbers) / 1000}).rollout_buffer)
    assert [len(set(group)) for group in starts] == [1] * 4 and len({group[0] for group in starts}) == 4


def test_settings_reach_the_environment():
    """A callback that makes the task harder sets them with SB3's ``set_attr``."""
    env = DummyVecEnv([Lottery, Lottery])
    learn(env)
    env.set_attr("level", 5, indices=[1])
    assert [getattr(each.unwrapped, "level", None) for each in env.envs] == [None, 5]
    assert env.get_attr("level", [1]) == [5]


def test_options():
    """A start can be an option that follows from the seed."""
    model = learn(DummyVecEnv([Lottery]), group_options=lambda seed: {"start": seed % 2 - 0.5})
    starts = starts_of(model.rollout_buffer)
    assert {group[0] for group in starts} <= {-0.5, 0.5} and all(len(set(group)) == 1 for group in starts)


@pytest.mark.parametrize("n_episodes, n_envs", [(12, 1), (12, 5), (4, 3), (3, 3), (7, 4)])
def test_episodes_are_numbered_in_the_order_in_which_they_begin(n_episodes, n_envs):
    quota = EpisodeQuota(n_episodes, n_envs, 100)
    assert sorted(number for numbers in quota.numbers for number in numbers) == list(range(n_episodes))
    assert [len(numbers) for numbers in quota.numbers] == quota.quotas.tolist()
    for first, later in zip(range(n_episodes), range(1, n_episodes), strict=False):
        rounds = [next(int(r) for numbers in quota.numbers for r in np.flatnonzero(numbers == n)) for n in (first, later)]
        assert rounds[0] <= rounds[1]
    # Two processes number them as one
    parts = [EpisodeQuota(n_episodes, n, 100, start, n_envs) for n, start in ((1, 0), (n_envs - 1, 1))]
    found = [numbers.tolist() for part in parts for numbers in part.numbers]
    assert found == [numbers.tolist() for numbers in quota.numbers]


def test_target_steps_asks_for_whole_groups():
    model = learn(make_vec_env(Lottery, 2), n_episodes=None, target_steps=40)
    assert model.rollout_buffer.n_episodes % 6 == 0 and model.rollout_buffer.n_episodes > 9


def test_groups_without_signal():
    """The prize depends on the start alone."""
    assert logged(learn(make_vec_env(Lottery, 2)))["rollout/groups_without_signal"] == 4
    model = learn(make_vec_env("CartPole-v1", 2))
    returns = model.rollout_buffer.lengths  # One reward a step
    expected = sum(len(set(returns[model.rollout_buffer.groups == group])) == 1 for group in range(4))
    assert logged(model)["rollout/groups_without_signal"] == expected < 4


# The greedy baseline


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("n_envs", [1, 2, 5])
def test_a_greedy_episode_for_each_group(n_envs, group_size):
    model = learn(make_vec_env("Pendulum-v1", n_envs), n_episodes=6, group_size=group_size, baseline="greedy")
    with mock.patch.object(Logger, "dump"):  # Which forgets what was logged
        model.learn(1, reset_num_timesteps=False)
    buffer = model.rollout_buffer
    assert buffer.n_episodes == 6 and sorted(buffer.greedy_groups) == list(range(6 // group_size))
    assert logged(model)["rollout/episodes"] == 6
    assert logged(model)["rollout/steps"] == 200 * (6 + 6 // group_size)
    # Their returns are not those of the policy that is logged
    assert sum(record in [episode.record for episode in buffer.greedy_episodes] for record in model.ep_info_buffer) == 0
    for episode in buffer.greedy_episodes:
        deterministic, _ = model.predict(episode.observations, deterministic=True)
        np.testing.assert_allclose(episode.actions, deterministic, atol=1e-5)
        others = [other for other in buffer.episodes if other.group == episode.group]
        assert len(others) == group_size
        for other in others:
            np.testing.assert_array_equal(other.observations[0], episode.observations[0])
            assert np.abs(other.actions - episode.actions).max() > 0.1
    # Its reward-to-go is the baseline of the group
    greedy = {episode.group: episode for episode in buffer.greedy_episodes}
    estimate = np.concatenate([greedy[episode.group].rewards[::-1].cumsum()[::-1] for episode in buffer.episodes])
    model.gamma, model.normalize_advantage, model.reduction = 1.0, False, "episode"
    model._estimate_advantages(None, buffer.chunks(10**6))
    np.testing.assert_allclose(buffer.returns - buffer.advantages, estimate, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ACTION_SPACES)
@pytest.mark.parametrize("kind", [NumpySampler, TorchSampler])
def test_samplers_take_the_likeliest_action_where_asked(name, kind):
    model = REINFORCE("MlpPolicy", DummyVecEnv([lambda: SpacesEnv(ACTION_SPACES[name])]), device="cpu")
    th.manual_seed(0)
    for parameter in model.policy.parameters():
        parameter.data.add_(0.3 * th.randn_like(parameter))
    obs = np.random.default_rng(0).uniform(-1, 1, (40, 3)).astype(np.float32)
    greedy = np.arange(40) % 2 == 0
    actions = kind(model.policy, 40)(obs, None, greedy)
    likeliest, _ = model.policy.predict(obs, deterministic=True)
    sampled = kind(model.policy, 40)(obs)
    clipped = np.clip(actions, -1, 1) if name == "box" else actions
    np.testing.assert_allclose(clipped[greedy], likeliest[greedy], atol=1e-5)
    assert (clipped[~greedy] != likeliest[~greedy]).any() and (sampled[greedy] != actions[greedy]).any()


class SpacesEnv(gym.Env):
    observation_space = spaces.Box(-1, 1, (3,))

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}


def test_a_callback_can_evaluate_in_an_environment_that_is_normalized_likewise(tmp_path):
    env, eval_env = (VecNormalize(make_vec_env("CartPole-v1", 2)) for _ in range(2))
    callback = EvalCallback(eval_env, eval_freq=5, n_eval_episodes=1, verbose=0)
    make_model(env, n_episodes=4, group_size=2).learn(50, callback=callback)
    assert callback.n_calls > 5 and callback.last_mean_reward > 0


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("callback", [None, lambda *_: False, interrupt], ids=["", "stopped", "interrupted"])
def test_the_environments_can_be_used_without_groups_afterwards(callback):
    """Each goes on with random numbers of its own, also if a callback or an error has stopped the rollout."""
    env = make_vec_env("CartPole-v1", 4)
    model = make_model(env, n_episodes=8, group_size=4)
    with pytest.raises(KeyboardInterrupt) if callback is interrupt else nullcontext():
        model.learn(1, callback=callback)
    assert all(len(np.unique(env.reset(), axis=0)) == 4 for _ in range(3))
    env.seed(3)
    expected = make_vec_env("CartPole-v1", 4)
    expected.seed(3)
    np.testing.assert_array_equal(env.reset(), expected.reset())
    model = make_model(env, n_episodes=4).learn(1)
    assert len(np.unique(model.rollout_buffer.observations[model.rollout_buffer.episode_starts], axis=0)) == 4


# Is it worth it?


class StartAndNoise(Lottery):
    """The return is a normal number of the start, and another one that the generator of the actions draws."""

    def __init__(self, std_of_start):
        self.std_of_start = std_of_start

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        self.start = self.std_of_start * self.np_random.standard_normal()
        return observation, info

    def step(self, action):
        return np.zeros(2), self.start + np.random.standard_normal(), True, False, {}


@pytest.mark.parametrize("std_of_start", [0, 1, 3])
def test_share_of_the_start(std_of_start):
    """Within four standard errors of 32 starts of 8 episodes (Fisher's approximation)."""
    share = std_of_start**2 / (std_of_start**2 + 1)
    model = make_model(DummyVecEnv([lambda: StartAndNoise(std_of_start)] * 2))
    standard_error = (1 - share) * (1 + 7 * share) * np.sqrt(2 / (8 * 7 * 31))
    assert start_share(model) == pytest.approx(share, abs=4 * standard_error)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_estimates_of_groups_are_better_where_the_start_is_all(n_envs, tmp_path):
    model = make_model(DummyVecEnv([lambda: StartAndNoise(30)] * n_envs), n_episodes=4)
    before = model.policy.state_dict()["action_net.weight"].clone()
    gradients(tmp_path, model, n_episodes=256, batch_sizes=[8], group_size=4)
    # The model itself is as it was
    assert (model.n_episodes, model.group_size, model.num_timesteps) == (4, 1, 0)
    assert th.equal(model.policy.state_dict()["action_net.weight"], before)
    rows = [line.split("|")[1:-1] for line in (tmp_path / "gradients.md").read_text().split("## Episodes")[1].splitlines()]
    variances = {(row[1].strip(), int(row[3])): float(row[5]) for row in rows if len(row) == 7 and row[3].strip().isdigit()}
    for baseline in ("timestep", "leave_one_out"):
        assert variances[baseline, 4] < 0.05 * variances[baseline, 1]
    assert "group_size=4 is worth a try" in (tmp_path / "gradients.md").read_text()


def test_models_that_gradients_of_groups_are_not_for(tmp_path):
    env = DummyVecEnv([lambda: StartAndNoise(1)])
    options = make_model(env, n_episodes=4, group_size=2, group_options=lambda seed: {"start": 0.0})
    for model, kwargs, message in (
        (make_model(env), dict(group_size=3, batch_sizes=[4]), "one of batch_sizes=.4. must be a multiple of it"),
        (make_model(env, time_limit="discard"), {}, "time_limit='discard' leaves out episodes"),
        (options, dict(group_size=2), "group_options: episodes without groups would have other starts"),
    ):
        with pytest.raises(ValueError, match=message):
            gradients(tmp_path, model, n_episodes=16, **kwargs)
    # A model whose episodes share starts is measured as one whose episodes do not
    table = gradients(tmp_path, make_model(env, n_episodes=4, group_size=4, baseline="greedy"), n_episodes=16, batch_sizes=[2])
    assert np.isfinite(table["variance"]).all() and (table["n_batches"] == 8).all()


@pytest.mark.parametrize(
    "share, variances, advice",
    [
        (0.05, [(4.0, 1.0)], "5% of the variance.*groups cannot help here"),
        (0.6, [(4.0, 2.0), (3.0, 5.0)], "60% .*group_size=4 is worth a try: gradients of 16 episodes vary 0.67 times as much"),
        (0.6, [(4.0, 8.0), (5.0, 9.0)], "groups cost: gradients of 16 episodes vary 2.00 times as much"),
        (0.6, [(4.0, 4.4)], "groups change little: gradients of 16 episodes vary 1.10 times as much"),
    ],
)
def test_advice(share, variances, advice):
    """By the larger batches, and by the better baseline with and without groups."""
    rows = [
        dict(returns="episode", baseline=str(i), n_episodes=n, group_size=size, n_batches=9, variance=variance, snr=1.0)
        for i, pair in enumerate(variances)
        for size, right in zip((1, 4), pair, strict=True)
        for n, variance in ((8, 1 / right), (16, right))
    ]
    assert re.search(advice, describe(share, pd.DataFrame(rows), 4))


# Bad input


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(group_size=0), "group_size=0 must be an integer in"),
        (dict(group_size=5), "n_episodes=12 must be a multiple of group_size=5"),
        (dict(group_size=3, time_limit="discard"), "time_limit='discard' would leave groups without some of their episodes"),
        (dict(baseline="greedy", time_limit="discard"), "time_limit='discard' would leave groups without some"),
        (dict(group_size=3, group_options={"goal": 1}), "group_options={'goal': 1} must be a function of the seed, or None"),
        (dict(group_options=lambda seed: {}), "group_options is for episodes that share a start"),
    ],
)
def test_arguments_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        make_model(n_episodes=12, **settings)


def test_options_that_are_no_dictionary():
    with pytest.raises(ValueError, match=r"group_options\(0\)=3 must be a dictionary"):
        learn(Lottery(), group_options=lambda seed: 3)


def test_a_baseline_that_knows_no_groups():
    with pytest.warns(UserWarning, match="group_size=2 has no use for baseline='value'"):
        make_model(baseline="value", group_size=2)


@pytest.mark.parametrize(
    "env, message",
    [
        (lambda: DummyVecEnv([Unseeded]), "Two resets with the same seed have given different observations"),
        (lambda: DummyVecEnv([NotFinite]), "The observation of environment 0 at step 0 of the rollout is not finite"),
        (lambda: DummyVecEnv([lambda: EpisodicLifeEnv(Lives())]), "make_atari_env.*terminal_on_life_loss=False"),
        (lambda: SubprocVecEnv([lambda: Monitor(Lottery())]), "those of SubprocVecEnv are out of reach: take a DummyVecEnv"),
    ],
)
def test_environments_whose_start_cannot_be_told(env, message, tmp_path):
    env = env()
    with pytest.raises(ValueError, match=message):
        learn(env)
    with pytest.raises(ValueError, match=message):
        gradients(tmp_path, make_model(env), n_episodes=8, batch_sizes=[4], group_size=2)
    assert not list(tmp_path.iterdir())  # Before any work is lost
    env.close()
