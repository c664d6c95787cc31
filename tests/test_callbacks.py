import os

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor

from sb3_reinforce import REINFORCE
from sb3_reinforce.callbacks import TimestepsBarCallback
from tests.envs import CountEnv
from tests.helpers import Batches, batch_of, count_envs, make_model, weights, whole_episodes

LENGTH = 5


def counting_model(n_envs=1, **kwargs):
    """Make a model whose rollouts hold two episodes of each environment: ten time steps of all."""
    return make_model(count_envs(n_envs), **{"n_episodes": 2 * n_envs, **kwargs})


class CountCallback(BaseCallback):
    """Count the calls, and stop the training at the given one."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.stop_at = stop_at
        self.n_training_starts = self.n_training_ends = self.n_rollout_starts = self.n_rollout_ends = 0

    def _on_training_start(self):
        self.n_training_starts += 1

    def _on_rollout_start(self):
        self.n_rollout_starts += 1
        self.weights = weights(self.model)

    def _on_step(self):
        return self.n_calls != self.stop_at

    def _on_rollout_end(self):
        self.n_rollout_ends += 1

    def _on_training_end(self):
        self.n_training_ends += 1


def test_eval_callback(tmp_path):
    callback = EvalCallback(
        Monitor(CountEnv(LENGTH)),
        n_eval_episodes=3,
        eval_freq=7,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
        verbose=0,
    )
    model = counting_model().learn(60, callback=callback)
    with np.load(tmp_path / "evaluations.npz") as file:
        evaluations = dict(file)
    np.testing.assert_array_equal(evaluations["timesteps"], np.arange(7, 61, 7))
    np.testing.assert_array_equal(evaluations["ep_lengths"], np.full((8, 3), LENGTH))
    means = evaluations["results"].mean(axis=1)
    assert means.max() == pytest.approx(callback.best_mean_reward)
    assert means.max() > means[0]
    best_model = REINFORCE.load(tmp_path / "best_model")
    assert best_model.num_timesteps == evaluations["timesteps"][means.argmax()]
    # Evaluation leaves no trace in the training
    assert th.equal(weights(model), weights(counting_model().learn(60)))


def test_checkpoint_callback(tmp_path):
    callback = CheckpointCallback(save_freq=7, save_path=str(tmp_path), name_prefix="count")
    counting_model(n_envs=2).learn(40, callback=callback)
    assert set(os.listdir(tmp_path)) == {"count_14_steps.zip", "count_28_steps.zip"}
    assert REINFORCE.load(tmp_path / "count_28_steps").num_timesteps == 28


@pytest.mark.parametrize("n_envs, max_episodes", [(1, 1), (1, 2), (2, 3)])
def test_stop_training_on_max_episodes(n_envs, max_episodes):
    model = counting_model(n_envs).learn(1000, callback=StopTrainingOnMaxEpisodes(max_episodes))
    assert model.num_timesteps == n_envs * max_episodes * LENGTH


@pytest.mark.parametrize("threshold, num_timesteps", [(-1e3, 7), (1e3, 40)])
def test_stop_training_on_reward_threshold(threshold, num_timesteps):
    callback = EvalCallback(
        Monitor(CountEnv()), callback_on_new_best=StopTrainingOnRewardThreshold(threshold), eval_freq=7, verbose=0
    )
    assert counting_model().learn(40, callback=callback).num_timesteps == num_timesteps


def test_stop_training_on_no_model_improvement():
    # Nothing is learned: after the fourth evaluation, the two after the first two have brought no improvement
    stop = StopTrainingOnNoModelImprovement(max_no_improvement_evals=1, min_evals=2)
    callback = EvalCallback(Monitor(CountEnv()), callback_after_eval=stop, eval_freq=7, verbose=0)
    assert counting_model(learning_rate=0).learn(1000, callback=callback).num_timesteps == 4 * 7


def test_every_n_timesteps():
    event = CountCallback()
    counting_model(n_envs=2).learn(40, callback=EveryNTimesteps(n_steps=8, callback=event))
    assert event.n_calls == 5
    assert event.num_timesteps == 40
    assert "dones" in event.locals


def test_log_every_n_timesteps(tmp_path):
    model = counting_model()
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(30, callback=LogEveryNTimesteps(n_steps=8), log_interval=None)
    model.logger.close()
    log = np.genfromtxt(tmp_path / "progress.csv", delimiter=",", names=True, deletechars="")
    np.testing.assert_array_equal(log["time/total_timesteps"], [8, 16, 24])


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_progress_bar(monkeypatch):
    progress = []
    on_training_end = ProgressBarCallback._on_training_end

    def record(self):
        progress.append((self.pbar.n, self.pbar.total))
        on_training_end(self)

    monkeypatch.setattr(ProgressBarCallback, "_on_training_end", record)
    model = counting_model(n_envs=3).learn(40, progress_bar=True)
    model.learn(20, progress_bar=True, reset_num_timesteps=False)
    # Rollouts are 30 steps long
    assert progress == [(60, 40), (30, 20)]


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_progress_bar_follows_the_time_steps(capsys):
    """Those of other processes are known at the end of a rollout; environments that owe nothing may not be stepped."""
    model = counting_model(n_envs=3)
    model.num_timesteps = 5
    bar = TimestepsBarCallback()
    bar.init_callback(model)
    bar.on_training_start({"total_timesteps": 40}, {})
    found = []
    for model.num_timesteps in (6, 20):
        bar.on_step()
        found.append(bar.pbar.n)
    model.num_timesteps = 40
    bar.on_training_end()
    assert found == [1, 15] and bar.pbar.n == bar.pbar.total == 35


@pytest.mark.parametrize("kind", [CallbackList, list])
def test_callback_list(kind):
    callbacks = [CountCallback(), CountCallback()]
    counting_model(n_envs=2).learn(60, callback=kind(callbacks))
    for callback in callbacks:
        assert callback.n_calls == 30
        assert callback.n_rollout_starts == callback.n_rollout_ends == 3
        assert callback.n_training_starts == callback.n_training_ends == 1


def test_function_callback():
    total_rewards = []

    def callback(locals_, globals_):
        total_rewards.append(locals_["rewards"].sum())
        return len(total_rewards) < 7

    assert counting_model(n_envs=2).learn(60, callback=callback).num_timesteps == 14
    assert len(total_rewards) == 7


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("stop_at", [1, 3, 5, 10, 13])
def test_stop(n_envs, stop_at):
    """Stop in the middle and at the end of an episode and of a rollout of ten steps, and in the second rollout."""
    model = counting_model(n_envs)
    callback = CountCallback(stop_at)
    model.learn(1000, callback=callback)
    n_updates = (stop_at - 1) // 10
    assert model.num_timesteps == stop_at * n_envs
    assert model._n_updates == callback.n_rollout_ends == n_updates
    assert th.equal(weights(model), callback.weights)
    assert callback.n_training_ends == 1

    batches = whole_episodes()
    model.learn(20 * n_envs, callback=batches, reset_num_timesteps=False)
    assert len(batches.results) == 2
    assert model.num_timesteps == (stop_at + 20) * n_envs
    assert model._n_updates == n_updates + 2
    assert not th.equal(weights(model), callback.weights)


def test_locals():
    class LocalsCallback(BaseCallback):
        def _on_training_start(self):
            assert self.locals["total_timesteps"] == 60
            self.rewards, self.dones, self.actions = [], [], []
            self.n_batches = 0

        def _on_step(self):
            locals_ = self.locals
            assert locals_["env"] is self.training_env
            assert locals_["rollout_buffer"] is self.model.rollout_buffer
            assert locals_["new_obs"].shape == (3, 1)
            assert len(locals_["infos"]) == 3
            low, high = self.model.action_space.low, self.model.action_space.high
            np.testing.assert_array_equal(locals_["clipped_actions"], np.clip(locals_["actions"], low, high))
            np.testing.assert_allclose(locals_["rewards"], locals_["clipped_actions"].sum(axis=1), rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(locals_["dones"], ["terminal_observation" in info for info in locals_["infos"]])
            self.rewards.append(locals_["rewards"])
            self.dones.append(locals_["dones"])
            self.actions.append(locals_["actions"])
            return True

        def _on_rollout_end(self):
            self.n_batches += 1
            buffer, batch = self.model.rollout_buffer, batch_of(self.model)
            # The buffer has the episodes end to end, environment by environment
            np.testing.assert_array_equal(buffer.rewards, np.transpose(self.rewards).flatten())
            np.testing.assert_array_equal(batch.actions, np.concatenate(np.swapaxes(self.actions, 0, 1)))
            np.testing.assert_array_equal(np.cumsum(buffer.lengths) - 1, np.flatnonzero(np.transpose(self.dones)))
            self.rewards, self.dones, self.actions = [], [], []

    callback = LocalsCallback()
    counting_model(n_envs=3, policy_kwargs=dict(log_std_init=1.0)).learn(60, callback=callback)
    assert callback.n_batches == 2


@pytest.mark.parametrize("baseline", [None, "timestep", "value"])
@pytest.mark.parametrize("in_place", [True, False])
def test_rewards_after_the_fact(baseline, in_place):
    """A callback can reward the actions at the end of the rollout."""

    def reward(buffer):
        (batch,) = buffer.get()
        rewards = batch.actions.clamp(-1, 1).numpy().sum(axis=1)
        if in_place:
            buffer.rewards[:] = rewards
        else:
            buffer.rewards = rewards

    def learn(rewarded, callback=None):
        model = make_model(count_envs(2, rewarded=rewarded), baseline=baseline)
        return weights(model.learn(60, callback=callback))

    after_the_fact = learn(False, Batches(reward))
    assert th.equal(after_the_fact, learn(True))
    assert not th.equal(after_the_fact, learn(False))


def test_env_is_stepped_before_the_first_rollout():
    """Rollouts start from a reset, whatever happened to the environment since the training started."""

    class Step(BaseCallback):
        def _on_training_start(self):
            self.training_env.step(np.zeros((1, 2)))

        def _on_step(self):
            return True

    batches = whole_episodes()
    counting_model().learn(20, callback=[Step(), batches])
    assert len(batches.results) == 2


def test_keyboard_interrupt(tmp_path):
    def interrupt(locals_, globals_):
        if locals_["self"].num_timesteps == 2 * 13:
            raise KeyboardInterrupt
        return True

    model = counting_model(n_envs=2)
    with pytest.raises(KeyboardInterrupt):
        model.learn(1000, callback=interrupt)
    assert model.num_timesteps == 2 * 13
    model.save(tmp_path / "interrupted")
    loaded = REINFORCE.load(tmp_path / "interrupted", env=model.get_env())
    assert th.equal(weights(loaded), weights(model))

    for resumed in (loaded, model):
        before = weights(resumed)
        batches = whole_episodes()
        resumed.learn(20, callback=batches, reset_num_timesteps=False)
        assert len(batches.results) == 1
        assert resumed.num_timesteps == 2 * 23
        assert resumed._n_updates == 2
        assert not th.equal(weights(resumed), before)
