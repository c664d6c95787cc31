"""Rewards that a function gives to whole episodes."""

from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_reinforce.episode_reward import EpisodeReward, EpisodeRewardWrapper
from sb3_reinforce.parallel import processes
from tests.helpers import logged, make_model, raises
from tests.parallel_runs import Recorded, in_processes


def length_squared(episode):
    """Pay an episode as a whole."""
    return len(episode) ** 2


def steps_to_the_end(episode):
    """Pay each step."""
    return np.arange(len(episode), 0, -1)


def ranks(episodes):
    """Pay the longest episode most."""
    return np.argsort(np.argsort([len(episode) for episode in episodes])).tolist()


def dumped(model):
    """Return what the model would log now."""
    with mock.patch.object(model.logger, "dump"):
        model.dump_logs()
    return logged(model)


def learn(callback, **kwargs):
    env = DummyVecEnv([lambda index=index: Monitor(Recorded(index)) for index in range(3)])
    model = make_model(env, n_episodes=7, **kwargs)
    return model.learn(1, callback=callback)


def test_one_number_is_paid_in_the_last_step():
    model = learn(EpisodeReward(length_squared))
    buffer = model.rollout_buffer
    for episode in buffer.episodes:
        assert episode.rewards.tolist() == [0] * (len(episode) - 1) + [len(episode) ** 2]
    assert dumped(model)["rollout/ep_rew_mean"] == pytest.approx(np.mean(buffer.lengths**2))


def test_numbers_of_the_steps():
    """What is learned from is what is logged, and the environment's own rewards stand beside it."""
    own = dumped(learn(None))["rollout/ep_rew_mean"]
    model = learn(EpisodeReward("tests.test_episode_reward:steps_to_the_end"))
    lengths = model.rollout_buffer.lengths
    assert model.rollout_buffer.rewards.tolist() == [n for length in lengths for n in range(length, 0, -1)]
    assert dumped(model)["rollout/ep_rew_mean"] == pytest.approx(np.mean(lengths * (lengths + 1) / 2))
    assert dumped(model)["rollout/ep_env_rew_mean"] == pytest.approx(own)
    assert own != pytest.approx(dumped(model)["rollout/ep_rew_mean"])


def test_judge_of_all_episodes():
    model = learn(EpisodeReward(ranks, of_batch=True))
    assert sorted(episode.rewards.sum() for episode in model.rollout_buffer.episodes) == list(range(7))


def test_judge_sees_the_episode():
    seen = []

    def judge(episode):
        seen.append(
            (episode.observations, episode.actions, episode.rewards.copy(), episode.infos, episode.terminal_observation)
        )
        return 0.0

    class Informed(Recorded):
        def step(self, action):
            *outcome, _ = super().step(action)
            return *outcome, {"time": self.time}

    model = make_model(DummyVecEnv([lambda: Informed(0)]), n_episodes=2)
    model.learn(1, callback=EpisodeReward(judge, info_keywords=("time",)))
    for observations, actions, rewards, infos, last in seen:
        n_steps = len(rewards)
        assert observations.shape == (n_steps, 3) and actions.shape == (n_steps, 1) and last.shape == (3,)
        assert [info["time"] for info in infos] == list(range(1, n_steps + 1))
        np.testing.assert_allclose(rewards, np.cos(range(1, n_steps + 1)) + np.clip(actions[:, 0], -1, 1), rtol=1e-5)


def test_greedy_episodes_are_judged_too():
    env = make_vec_env("CartPole-v1", 2)
    model = make_model(env, n_episodes=4, group_size=2, baseline="greedy")
    model.learn(1, callback=EpisodeReward(length_squared))
    assert [episode.rewards.sum() for episode in model.rollout_buffer.greedy_episodes] == [
        len(episode) ** 2 for episode in model.rollout_buffer.greedy_episodes
    ]


def test_wrapper_pays_the_same():
    """A judge sees the same episodes in the wrapper, which algorithms and evaluations then know the reward of."""
    seen = {}

    def judge(name):
        def function(episode):
            seen[name] = (episode.observations, episode.actions, episode.rewards.copy(), episode.terminal_observation)
            assert episode.truncated  # As all episodes of odd environments
            return 3.0 * len(episode)

        return function

    for name in ("callback", "wrapper"):
        env = Monitor(Recorded(1))
        callback = EpisodeReward(judge(name)) if name == "callback" else None
        model = make_model(EpisodeRewardWrapper(env, judge(name)) if name == "wrapper" else env, n_episodes=1, baseline=None)
        model.learn(1, callback=callback)
        assert dumped(model)["rollout/ep_rew_mean"] == 3 * model.rollout_buffer.lengths[0]
        assert "rollout/ep_env_rew_mean" in dumped(model)
        assert model.rollout_buffer.rewards.tolist() == [0] * (model.rollout_buffer.n_steps - 1) + [3 * len(seen[name][0])]
    for one, other in zip(*seen.values(), strict=True):
        np.testing.assert_allclose(np.clip(one, -1, 1), np.clip(other, -1, 1), rtol=1e-6)


def test_wrapper_keeps_copies():
    """Some environments, and loops, use their arrays and infos again."""

    info = {}

    class Frugal(Recorded):
        def step(self, action):
            *outcome, _ = super().step(action)
            info["time"] = self.time
            return *outcome, info

    seen, action = [], np.zeros(1)
    env = EpisodeRewardWrapper(Frugal(1), lambda episode: seen.append(episode) or 0.0)
    env.reset(seed=0)
    for action[:] in range(100):
        if env.step(action)[2]:
            break
    assert seen[0].actions[:, 0].tolist() == list(range(len(seen[0])))
    assert [info["time"] for info in seen[0].infos] == list(range(1, len(seen[0]) + 1))


def test_a_judgement_has_no_future():
    """The critic is not to add to it at a time limit: the wrapper tells a termination, the callback warns."""
    env = Monitor(Recorded(1))
    settings = dict(n_episodes=1, baseline="value", gae_lambda=None, time_limit=None)
    model = make_model(EpisodeRewardWrapper(env, length_squared), **settings).learn(1)
    assert model.bootstraps and not model.rollout_buffer.episodes[0].truncated
    with pytest.warns(UserWarning, match="choose time_limit='terminal' if the judgement is the whole reward") as caught:
        make_model(env, **settings).learn(60, callback=EpisodeReward(length_squared))
    assert len(caught) == 1
    make_model(env, **{**settings, "time_limit": "bootstrap"}).learn(1, callback=EpisodeReward(length_squared))


def test_two_judges():
    """The second one goes on from the rewards of the first; the environment's own are still those of the environment."""
    own = dumped(learn(None))["rollout/ep_rew_mean"]
    model = learn([EpisodeReward(length_squared), EpisodeReward(lambda episode: 2 * episode.rewards)])
    logs = dumped(model)
    assert logs["rollout/ep_env_rew_mean"] == pytest.approx(own)
    assert logs["rollout/ep_rew_mean"] == pytest.approx(2 * np.mean(model.rollout_buffer.lengths**2))


def test_evaluation_with_the_wrapper(tmp_path):
    for outer, inner in ((lambda env: env, Monitor), (Monitor, lambda env: env)):
        env = outer(EpisodeRewardWrapper(inner(gym.make("Pendulum-v1")), length_squared))
        model = make_model(gym.make("Pendulum-v1"))
        assert evaluate_policy(model, env, n_eval_episodes=2)[0] == 200**2
    eval_env = make_vec_env("CartPole-v1", wrapper_class=EpisodeRewardWrapper, wrapper_kwargs={"function": length_squared})
    callback = EvalCallback(eval_env, n_eval_episodes=1, eval_freq=10, log_path=str(tmp_path), verbose=0)
    make_model(make_vec_env("CartPole-v1")).learn(30, callback=callback)
    evaluations = np.load(tmp_path / "evaluations.npz")
    assert (evaluations["results"] == evaluations["ep_lengths"] ** 2).all()


def two_processes():
    """Both processes judge their own episodes, and log the mean of all."""
    env = DummyVecEnv([lambda: Monitor(Recorded(processes.rank()))])
    model = make_model(env, n_episodes=4)
    model.learn(1, callback=EpisodeReward(length_squared))
    lengths = np.concatenate(processes.gather(model.rollout_buffer.lengths))
    assert model.rollout_buffer.total_episodes == len(lengths) == 4
    assert sorted(record["r"] for record in model.ep_info_buffer) == sorted(lengths**2)


@pytest.mark.distributed
def test_processes():
    in_processes(2, two_processes)


@pytest.mark.parametrize("judgement", [np.nan, [1.0, 2.0], None])
def test_bad_judgements(judgement):
    with raises("The reward of an episode of", "steps is a finite number, or", f"of them, not {judgement}"):
        learn(EpisodeReward(lambda episode: judgement))


def test_an_environment_that_returns_the_same_array():
    class InPlace(Recorded):
        def reset(self, **kwargs):
            super().reset(**kwargs)
            self.array = np.zeros(3, np.float32)
            return self.array, {}

        def step(self, action):
            self.array += 1
            return self.array, *super().step(action)[1:]

    seen = []
    env = EpisodeRewardWrapper(InPlace(1), lambda episode: seen.append(episode.observations[:, 0].tolist()) or 1.0)
    make_model(env, n_episodes=1, baseline=None).learn(1)
    assert seen[0] == list(range(len(seen[0])))


def test_models_that_it_is_not_for():
    env = make_vec_env("CartPole-v1")
    with raises("EpisodeReward is for REINFORCE", "not for PPO", "EpisodeRewardWrapper is for all algorithms"):
        PPO("MlpPolicy", env, device="cpu").learn(10, callback=EpisodeReward(length_squared))
    with raises("time_limit='discard' leaves out episodes, which EpisodeReward could not judge"):
        make_model(env, time_limit="discard").learn(10, callback=EpisodeReward(length_squared))


def test_bad_functions():
    with raises("info_keywords='time' must be a list of keys, not a text"):
        EpisodeReward(length_squared, info_keywords="time")
    with raises("7 episodes were judged, and 1 judgements returned"):
        learn(EpisodeReward(lambda episodes: [1.0], of_batch=True))
    for kind in (EpisodeReward, lambda name: EpisodeRewardWrapper(gym.make("CartPole-v1"), name)):
        with raises("is given by a function, or by its name 'module:function', not 'length'"):
            kind("length")
