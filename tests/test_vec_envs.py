"""Which steps enter the batch: whole episodes by quota, in order, as the policy saw them."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from sb3_reinforce.buffers import EpisodeRolloutBuffer
from tests.envs import NoisyImageEnv, Poison, RecordVec, TracingEnv
from tests.helpers import batch_of, make_model, weights


def make_env(lengths, vec_env_class=DummyVecEnv, monitor=True, **kwargs):
    def make(i):
        env = TracingEnv(i, lengths[i], **kwargs)
        return Monitor(env) if monitor else env

    return vec_env_class([lambda i=i: make(i) for i in range(len(lengths))])


def rows_of(episodes, lengths):
    """Return the observations of the given episodes ``(environment, episode)``."""
    return [[i, e, t] for i, e in episodes for t in range(lengths[i])]


def assert_batch(model, episodes, lengths):
    buffer = model.rollout_buffer
    batch = batch_of(model)
    assert batch.observations.tolist() == rows_of(episodes, lengths)
    assert buffer.lengths.tolist() == [lengths[i] for i, _ in episodes]
    assert [episode.env_idx for episode in buffer.episodes] == [i for i, _ in episodes]
    assert buffer.n_episodes == len(episodes)
    assert buffer.n_steps == len(buffer.rewards) == len(batch.observations)
    actions = batch.actions.flatten().numpy()
    assert len(set(actions)) > 1
    np.testing.assert_array_equal(buffer.rewards, batch.observations.numpy() @ [1000, 100, 10] + actions)


def assert_statistics_are_those_of_the_batch(model):
    buffer = model.rollout_buffer
    returns = np.add.reduceat(buffer.rewards, np.cumsum(buffer.lengths) - buffer.lengths)
    expected = sorted(zip(buffer.lengths, returns, strict=True))
    assert sorted((info["l"], info["r"]) for info in model.ep_info_buffer) == expected


@pytest.mark.parametrize(
    "vec_env_class, n_episodes, quotas",
    [
        (DummyVecEnv, 3, [1, 1, 1]),
        (DummyVecEnv, 4, [1, 1, 2]),
        (DummyVecEnv, 5, [1, 2, 2]),
        (DummyVecEnv, 6, [2, 2, 2]),
        (DummyVecEnv, 10, [3, 3, 4]),
        (SubprocVecEnv, 5, [1, 2, 2]),
    ],
)
def test_batch_holds_the_first_episodes_of_each_env(vec_env_class, n_episodes, quotas):
    lengths = [3, 5, 7]
    env = make_env(lengths, vec_env_class)
    model = make_model(env, n_episodes=n_episodes).learn(1)
    env.close()
    assert_batch(model, [(i, e) for i in range(3) for e in range(quotas[i])], lengths)
    assert_statistics_are_those_of_the_batch(model)
    # All environments are stepped until the slowest is done
    assert model.num_timesteps == 3 * max(quota * length for quota, length in zip(quotas, lengths, strict=True))


def test_slowest_env_is_not_the_last():
    lengths = [7, 3]
    model = make_model(make_env(lengths), n_episodes=4).learn(1)
    assert_batch(model, [(0, 0), (0, 1), (1, 0), (1, 1)], lengths)
    assert model.num_timesteps == 2 * 14


def test_next_rollout_starts_from_a_reset():
    lengths = [3, 5]
    model = make_model(make_env(lengths), n_episodes=2).learn(1)
    model.learn(1, reset_num_timesteps=False)
    assert model.num_timesteps == 20
    # The first rollout broke off episode 1 of environment 0
    assert_batch(model, [(0, 2), (1, 1)], lengths)


def test_target_steps():
    lengths = [3, 5]
    model = make_model(make_env(lengths), n_episodes=2, target_steps=17, stats_window_size=6).learn(1)
    assert_batch(model, [(0, 0), (1, 0)], lengths)
    model.learn(1, reset_num_timesteps=False)
    # Episodes have 4 steps on average: five of them have 20, and it takes six for both environments to give as many
    assert_batch(model, [(0, 2), (0, 3), (0, 4), (1, 1), (1, 2), (1, 3)], lengths)
    assert_statistics_are_those_of_the_batch(model)
    assert model.num_timesteps == 2 * 5 + 2 * 3 * 5


@pytest.mark.parametrize("target_steps, n_episodes", [(0, 2), (8, 2), (9, 4), (16, 4), (17, 6), (512, 128)])
def test_target_steps_are_rounded_up(target_steps, n_episodes):
    model = make_model(make_env([3, 5]), n_episodes=2, target_steps=target_steps).learn(1)
    assert (model.rollout_buffer.n_episodes, model.rollout_buffer.n_steps) == (2, 8)
    model.learn(1)
    assert (model.rollout_buffer.n_episodes, model.rollout_buffer.n_steps) == (n_episodes, 4 * n_episodes)


@pytest.mark.parametrize("target_steps, n_episodes", [(None, 3), (0, 3), (12, 3), (13, 4), (17, 6)])
def test_target_steps_beyond_n_episodes(target_steps, n_episodes):
    """A number that is given is the least, and stays where it is enough, although it is no multiple of two."""
    model = make_model(make_env([4, 4]), n_episodes=3, target_steps=target_steps).learn(1)
    assert model.rollout_buffer.n_episodes == 3
    assert model.learn(1).rollout_buffer.n_episodes == n_episodes


def test_number_of_episodes_is_known_before_the_rollout():
    """It follows the lengths of the two rollouts before, whatever those of this one are: a sum that stops is biased."""
    env = make_env([3])
    model = make_model(env, n_episodes=2, target_steps=24)
    known, found = [], []

    def callback(locals_, globals_):
        known[-1].add(int(model.quota.quotas.sum()))
        return True

    for length in (3, 12, 1, 1, 4):
        env.envs[0].unwrapped.length = length
        known.append(set())
        model.learn(1, callback=callback)
        assert set(model.rollout_buffer.lengths) == {length}
        found.append(model.rollout_buffer.n_episodes)
    # One rollout of short episodes asks for no more: the next could have 24 long ones
    assert found == [2, 24 // 3, 24 // 12, 24 // 12, 24 // 1]
    assert known == [{n} for n in found]


@pytest.mark.parametrize("n_envs, quotas, n_episodes", [(1, [8], 171), (3, [2, 3, 3], 171), (10, [1] * 10, 180)])
def test_n_episodes_none(n_envs, quotas, n_episodes):
    lengths = [3] * n_envs
    model = make_model(make_env(lengths), n_episodes=None).learn(1)
    assert_batch(model, [(i, e) for i in range(n_envs) for e in range(quotas[i])], lengths)
    # From then on 512 steps
    assert model.learn(1).rollout_buffer.n_episodes == n_episodes


def test_set_env_with_another_number_of_envs():
    model = make_model(make_env([3]), n_episodes=8).learn(1)
    model.set_env(make_env([3, 5]))
    model.learn(1)
    assert model.n_envs == 2
    assert_batch(model, [(i, e) for i in range(2) for e in range(4)], [3, 5])


def test_growing_does_not_change_the_training():
    class TinyBuffer(EpisodeRolloutBuffer):
        def __init__(self, buffer_size, *args, **kwargs):
            super().__init__(1, *args, **kwargs)

    models = [make_model(make_env([3, 5]), rollout_buffer_class=cls).learn(60) for cls in (TinyBuffer, None)]
    assert models[0].rollout_buffer.buffer_size < models[1].rollout_buffer.buffer_size
    assert th.equal(weights(models[0]), weights(models[1]))


# Wrappers


def assert_batch_is_what_the_model_got(model, env, quotas):
    batch = batch_of(model)
    np.testing.assert_array_equal(batch.observations.numpy(), env.of_batch(env.observations, quotas))
    np.testing.assert_array_equal(batch.actions.flatten().numpy(), env.of_batch(env.actions, quotas))
    np.testing.assert_array_equal(model.rollout_buffer.rewards, env.of_batch(env.rewards, quotas).astype(np.float32))
    return batch


def normalize(env):
    return VecNormalize(env, clip_reward=3.0)


def stack(env):
    return VecFrameStack(env, n_stack=2)


@pytest.mark.parametrize("wrap", [normalize, stack, VecMonitor, VecCheckNan, lambda env: stack(normalize(env))])
def test_wrappers(wrap):
    env = RecordVec(wrap(make_env([3, 5], monitor=False)))
    model = make_model(env, n_episodes=5).learn(1)
    assert_batch_is_what_the_model_got(model, env, [2, 3])
    assert model.rollout_buffer.lengths.tolist() == [3, 3, 5, 5, 5]


def test_vec_normalize():
    env = RecordVec(normalize(make_env([3, 5])))
    model = make_model(env, n_episodes=4).learn(1)
    batch = assert_batch_is_what_the_model_got(model, env, [2, 2])
    assert batch.observations.min() < 0
    assert model.rollout_buffer.rewards.max() <= 3
    # The statistics are those of the episodes as they are
    assert max(info["r"] for info in model.ep_info_buffer) >= 5 * 1000


class Whole(gym.ObservationWrapper):
    """Whole numbers as observations."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = spaces.Box(-100, 100, env.observation_space.shape, np.int8)

    def observation(self, observation):
        return np.asarray(100 * observation).astype(np.int8)


def test_vec_normalize_of_whole_numbers():
    """They are normalized to fractions, and stored as such."""
    env = RecordVec(VecNormalize(make_vec_env("CartPole-v1", 2, seed=0, wrapper_class=Whole)))
    model = make_model(env, n_episodes=2).learn(1)
    assert_batch_is_what_the_model_got(model, env, [1, 1])
    assert (model.rollout_buffer.observations % 1 != 0).any()


def test_reused_array_of_last_observations():
    class Reusing(VecEnvWrapper):
        def reset(self):
            self.last = np.zeros((self.num_envs, *self.observation_space.shape), np.float32)
            return self.venv.reset()

        def step_wait(self):
            obs, rewards, dones, infos = self.venv.step_wait()
            for i in np.flatnonzero(dones):
                self.last[i] = infos[i]["terminal_observation"]
                infos[i]["terminal_observation"] = self.last[i]
            return obs, rewards, dones, infos

    model = make_model(Reusing(make_vec_env("Pendulum-v1", seed=0)), n_episodes=2).learn(1)
    first, second = (episode.terminal_observation for episode in model.rollout_buffer.episodes)
    assert not np.array_equal(first, second)


def test_somebody_has_used_the_environment_since():
    """The environment itself, out of sight of the vectorized one: a call of ``learn`` begins with a reset."""
    inner = gym.make("CartPole-v1")
    model = make_model(inner, n_episodes=1, baseline=None).learn(1)
    inner.reset(seed=0)
    for _ in range(5):
        inner.step(1)
    model.learn(1, reset_num_timesteps=False)
    # What was acted on is what the next observation follows from
    first, second = model.rollout_buffer.observations[:2]
    assert second[0] == pytest.approx(first[0] + 0.02 * first[1], abs=1e-6)


def test_vec_frame_stack():
    env = VecFrameStack(make_env([3, 5]), n_stack=2)
    model = make_model(env, n_episodes=2).learn(1)
    expected = []
    for i, length in enumerate([3, 5]):
        expected += [[0, 0, 0, i, 0, 0]] + [[i, 0, t - 1, i, 0, t] for t in range(1, length)]
    assert batch_of(model).observations.tolist() == expected


def test_vec_monitor():
    model = make_model(VecMonitor(make_env([3, 5], monitor=False)), n_episodes=5).learn(1)
    assert_batch(model, [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)], [3, 5])
    assert_statistics_are_those_of_the_batch(model)


def test_vec_transpose_image():
    def make():
        return NoisyImageEnv(screen_height=36, screen_width=40, n_channels=3)

    env = RecordVec(DummyVecEnv([make, make]))
    model = make_model(env, "CnnPolicy", n_episodes=2).learn(1)
    assert isinstance(model.get_env(), VecTransposeImage)
    observations = batch_of(model).observations
    assert observations.dtype == th.uint8
    np.testing.assert_array_equal(observations.numpy(), env.of_batch(env.observations, [1, 1]).transpose(0, 3, 1, 2))


def test_vec_check_nan():
    env = DummyVecEnv([lambda: Poison(TracingEnv(), "reward", 1, np.nan)])
    with pytest.raises(ValueError, match="found nan in rewards"):
        make_model(VecCheckNan(env, raise_exception=True)).learn(1)


# Time limits

ENDS = ("terminated", "truncated", "both")


def set_critic(model, value):
    th.nn.init.zeros_(model.policy.value_net.weight)
    th.nn.init.constant_(model.policy.value_net.bias, value)


@pytest.mark.parametrize(
    "time_limit, gae_lambda, returns",
    [
        # gamma = 0.5, V = 8, rewards of 1: a return is 1 + 0.5 * (the return after it), ...
        ("terminal", 1, {"terminated": [1.75, 1.5, 1], "truncated": [1.75, 1.5, 1], "both": [1.75, 1.5, 1]}),
        ("bootstrap", 1, {"terminated": [1.75, 1.5, 1], "truncated": [2.75, 3.5, 5], "both": [1.75, 1.5, 1]}),
        ("discard", 1, {"terminated": [1.75, 1.5, 1], "both": [1.75, 1.5, 1]}),
        # ... with lambda = 0 it is 1 + 0.5 * 8 but for the last step, ...
        ("terminal", 0, {"terminated": [5, 5, 1], "truncated": [5, 5, 1], "both": [5, 5, 1]}),
        ("bootstrap", 0, {"terminated": [5, 5, 1], "truncated": [5, 5, 5], "both": [5, 5, 1]}),
        # ... and with lambda = 0.5 the return after it is half V, half return: 1 + 0.5 * (4 + 0.5 * 1) = 3.25
        ("terminal", 0.5, {"terminated": [3.8125, 3.25, 1], "truncated": [3.8125, 3.25, 1], "both": [3.8125, 3.25, 1]}),
        ("bootstrap", 0.5, {"terminated": [3.8125, 3.25, 1], "truncated": [4.0625, 4.25, 5], "both": [3.8125, 3.25, 1]}),
    ],
)
@pytest.mark.parametrize("n_envs", [1, 3])
def test_time_limit(time_limit, gae_lambda, returns, n_envs):
    env = DummyVecEnv([lambda i=i: TracingEnv(i, 3, ENDS, reward=1) for i in range(n_envs)])
    model = make_model(
        env,
        n_episodes=3 * n_envs,
        gamma=0.5,
        gae_lambda=gae_lambda,
        baseline="value",
        normalize_value=False,
        time_limit=time_limit,
    )
    set_critic(model, 8)
    model.learn(1)
    expected = np.concatenate([returns[end] for end in ENDS if end in returns] * n_envs)
    np.testing.assert_allclose(model.rollout_buffer.returns, expected, rtol=1e-6)
    assert model.rollout_buffer.lengths.tolist() == [3] * len(returns) * n_envs


@pytest.mark.parametrize("wrap", [normalize, stack, lambda env: env])
def test_bootstrap_takes_the_last_observation_as_the_policy_would_see_it(wrap):
    env = RecordVec(wrap(make_env([3], ends=("truncated",))))
    model = make_model(
        env,
        n_episodes=2,
        baseline="value",
        normalize_value=False,
        learning_rate=0.0,
        value_learning_rate=0.0,
        time_limit="bootstrap",
    )
    infos = []
    model.learn(1, callback=lambda locals_, _: infos.extend(locals_["infos"]) or True)
    terminal_observations = np.stack([info["terminal_observation"] for info in infos if "terminal_observation" in info])
    assert terminal_observations.shape == (2, *env.observation_space.shape)
    with th.no_grad():
        values = model.policy.predict_values(th.as_tensor(terminal_observations)).flatten().numpy()
    last = np.array([2, 5])
    np.testing.assert_allclose(
        model.rollout_buffer.returns[last], model.rollout_buffer.rewards[last] + 0.99 * values, rtol=1e-5
    )


def test_discard_without_an_episode_left():
    # Of the two episodes of each rollout none is left at first, then one, then two
    env = make_env([3], ends=("truncated",) * 3 + ("terminated",) * 3)
    model = make_model(env, n_episodes=2, time_limit="discard")
    before = weights(model)
    with pytest.warns(UserWarning, match="No update: 0 episodes .* at least 2 are needed.*time_limit='discard'"):
        model.learn(6)
    assert th.equal(weights(model), before)
    assert model._n_updates == 0
    with pytest.warns(UserWarning, match="No update: 1 episodes"):
        model.learn(6, reset_num_timesteps=False)
    assert th.equal(weights(model), before)
    model.learn(6, reset_num_timesteps=False)
    assert not th.equal(weights(model), before)
    assert model._n_updates == 1
    assert model.num_timesteps == 18


@pytest.mark.filterwarnings("ignore:No update")
def test_discard_goes_on_within_learn():
    env = make_env([3], ends=("truncated",) * 3 + ("terminated",) * 3)
    model = make_model(env, n_episodes=2, time_limit="discard").learn(18)
    assert model._n_updates == 1
    assert_batch(model, [(0, 4), (0, 5)], [3])
