import csv
import json
import re

import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.envs import CountEnv
from tests.helpers import Batches, batch_of, gradient_of, logged, make_model, record_gradients, vector_of

#: Baselines are also tried with returns that they are not made for
pytestmark = pytest.mark.filterwarnings("ignore:baseline=.* estimates the reward-to-go")

LENGTHS = (3, 5, 9)
N_STEPS = 2 * sum(LENGTHS)
N_TIMESTEPS = 2 * 3 * max(LENGTHS)

KEYS = {
    "rollout/episodes",
    "rollout/steps",
    "rollout/surplus_steps",
    "rollout/ep_rew_mean",
    "rollout/ep_len_mean",
    "train/approx_kl",
    "train/grad_norm",
    "train/grad_signal",
    "train/is_line_search_success",
    "train/return_mean",
    "train/return_std",
    "train/advantage_std",
    "train/advantage_ratio",
    "train/entropy_loss",
    "train/policy_loss",
    "train/learning_rate",
    "train/n_updates",
    "time/fps",
    "time/iterations",
    "time/time_elapsed",
    "time/total_timesteps",
}


def unequal_model(env=None, **kwargs):
    """Make a model that learns from two episodes of each of three environments, whose episodes have unequal lengths."""
    env = env or DummyVecEnv([lambda length=length: Monitor(CountEnv(length)) for length in LENGTHS])
    return make_model(env, **{"n_episodes": 6, **kwargs})


class Logs(BaseCallback):
    """Keep what is in the logger after each update, in ``results``."""

    def _on_training_start(self):
        self.results, self.is_first = [], True

    def _on_rollout_start(self):
        if not self.is_first:
            self._on_training_end()
        self.is_first = False

    def _on_step(self):
        return True

    def _on_training_end(self):
        self.results.append(logged(self.model))


def episodes_of_batch():
    """Make a callback that keeps the rewards of each batch, episode by episode."""
    return Batches(lambda buffer: np.split(buffer.rewards, np.cumsum(buffer.lengths)[:-1]))


def learn(model, total_timesteps=2 * N_TIMESTEPS):
    """Train, and return what is logged of each update, and the rewards of each batch, episode by episode."""
    logs, batches = Logs(), episodes_of_batch()
    model.learn(total_timesteps, callback=[logs, batches], log_interval=None)
    assert len(logs.results) == len(batches.results) > 0
    return logs.results, batches.results


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def read_json(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize(
    "kwargs, extra_keys",
    [
        (dict(baseline=None), {"train/std"}),
        (dict(baseline="mean"), {"train/explained_variance", "train/std"}),
        (dict(baseline="leave_one_out"), {"train/explained_variance", "train/std"}),
        (dict(baseline="timestep"), {"train/explained_variance", "train/std"}),
        (dict(baseline="linear"), {"train/explained_variance", "train/std"}),
        (dict(baseline="value"), {"train/explained_variance", "train/std", "train/value_loss"}),
        (dict(baseline=None, use_sde=True), {"train/std"}),
        (dict(baseline=None, policy_kwargs=dict(state_dependent_std=True)), {"train/std"}),
        (dict(baseline=None, env="CartPole-v1"), set()),
    ],
)
def test_keys(tmp_path, kwargs, extra_keys):
    model = unequal_model(**kwargs)
    model.set_logger(configure(str(tmp_path), ["csv", "json"]))
    model.learn(2 * N_TIMESTEPS)
    while model._n_updates < 2:
        model.learn(1, reset_num_timesteps=False)
    model.logger.close()
    # An update is logged with the rollout that follows it
    for log in (read_csv(tmp_path / "progress.csv")[-1], read_json(tmp_path / "progress.json")[-1]):
        assert set(log) == KEYS | extra_keys
        assert np.isfinite([float(value) for value in log.values()]).all()


def test_tensorboard(tmp_path):
    def steps(run):
        events = EventAccumulator(str(tmp_path / run)).Reload()
        assert KEYS - set(events.Tags()["scalars"]) == {
            "train/n_updates",
            "time/iterations",
            "time/time_elapsed",
            "time/total_timesteps",
        }
        return [event.step for event in events.Scalars("rollout/ep_rew_mean")]

    model = unequal_model(tensorboard_log=str(tmp_path))
    model.learn(2 * N_TIMESTEPS)
    model.learn(N_TIMESTEPS, reset_num_timesteps=False)
    model.learn(2 * N_TIMESTEPS)
    model.learn(1, tb_log_name="other")
    model.logger.close()
    assert {path.name for path in tmp_path.iterdir()} == {"REINFORCE_1", "REINFORCE_2", "other_1"}
    assert steps("REINFORCE_1") == [N_TIMESTEPS, 2 * N_TIMESTEPS, 3 * N_TIMESTEPS]
    assert steps("REINFORCE_2") == [N_TIMESTEPS, 2 * N_TIMESTEPS]


def test_stdout(capsys):
    model = unequal_model(verbose=1)
    capsys.readouterr()
    model.learn(2 * N_TIMESTEPS, log_interval=None)
    assert capsys.readouterr().out == ""
    model.learn(4 * N_TIMESTEPS, log_interval=2)
    table = capsys.readouterr().out
    assert table.count("ep_rew_mean") == 2
    assert re.search(rf"total_timesteps +\| {4 * N_TIMESTEPS} ", table)
    unequal_model().learn(1)
    assert capsys.readouterr().out == ""


def test_steps_add_up():
    model = unequal_model()
    logs, batches = learn(model)
    for log, batch in zip(logs, batches, strict=True):
        assert log["rollout/episodes"] == len(batch) == 6
        assert log["rollout/steps"] == N_STEPS
        assert log["rollout/surplus_steps"] == N_TIMESTEPS - N_STEPS
    assert sum(log["rollout/steps"] + log["rollout/surplus_steps"] for log in logs) == model.num_timesteps
    assert [log["train/n_updates"] for log in logs] == [1, 2]


def test_steps_add_up_with_target_steps_and_discard():
    """Steps of discarded episodes are steps of the rollout as well, and count for the mean length of its episodes."""
    env = DummyVecEnv([lambda length=length: CountEnv(length, truncate=length == 5) for length in LENGTHS])
    model = unequal_model(env, n_episodes=3, target_steps=N_STEPS + 1, time_limit="discard")
    logs, batches = learn(model, total_timesteps=N_TIMESTEPS)
    assert [(log["rollout/episodes"], len(batch)) for log, batch in zip(logs, batches, strict=True)] == [(3, 2), (9, 6)]
    assert [log["rollout/steps"] for log in logs] == [N_STEPS / 2, 1.5 * N_STEPS]
    assert [log["rollout/surplus_steps"] for log in logs] == [(N_TIMESTEPS - N_STEPS) / 2, 1.5 * (N_TIMESTEPS - N_STEPS)]
    assert model.num_timesteps == 2 * N_TIMESTEPS


def test_episode_statistics(tmp_path):
    """The surplus episodes of an environment do not count."""
    model = unequal_model(stats_window_size=6)
    model.set_logger(configure(str(tmp_path), ["json"]))
    batches = episodes_of_batch()
    model.learn(2 * N_TIMESTEPS, callback=batches)
    model.logger.close()
    logs = read_json(tmp_path / "progress.json")
    assert len(logs) == 2
    for log, batch in zip(logs, batches.results, strict=True):
        assert log["rollout/ep_len_mean"] == pytest.approx(np.mean(LENGTHS))
        assert log["rollout/ep_rew_mean"] == pytest.approx(np.mean([rewards.sum() for rewards in batch]), abs=1e-4)


@pytest.mark.parametrize("returns", ["reward_to_go", "episode"])
def test_return_mean_and_std(returns):
    model = unequal_model(gamma=0.9, returns=returns)
    for log, batch in zip(*learn(model), strict=True):
        expected = [(0.9 ** np.arange(len(rewards)) * rewards).sum() for rewards in batch]
        assert log["train/return_mean"] == pytest.approx(np.mean(expected), rel=1e-5)
        assert log["train/return_std"] == pytest.approx(np.std(expected), rel=1e-5)


def test_explained_variance_and_advantage_std():
    """The timestep baseline is the mean of what the other episodes that are still running get at the same time."""
    model = unequal_model(gamma=1.0, baseline="timestep", normalize_advantage=True)
    for log, batch in zip(*learn(model), strict=True):
        padded = np.zeros((6, max(LENGTHS)))
        for row, rewards in zip(padded, batch, strict=True):
            row[: len(rewards)] = np.cumsum(rewards[::-1])[::-1]
        played = np.arange(max(LENGTHS)) < np.array([[len(rewards)] for rewards in batch])
        # Each length occurs twice, so that no episode runs on alone
        baseline = (padded.sum(axis=0) - padded) / (played.sum(axis=0) - 1)
        advantages = (padded - baseline)[played]
        explained_variance = 1 - advantages.var() / padded[played].var()
        assert log["train/explained_variance"] == pytest.approx(explained_variance, rel=1e-4)
        assert log["train/advantage_std"] == pytest.approx(advantages.std(), rel=1e-4)


def test_gaussian_entropy_and_std():
    """The logged entropy and standard deviation are those of the policy before the update."""
    model = unequal_model(policy_kwargs=dict(log_std_init=-0.5))
    (first, second), _ = learn(model)
    assert first["train/std"] == pytest.approx(np.exp(-0.5))
    assert first["train/entropy_loss"] == pytest.approx(-(np.log(2 * np.pi * np.e) - 1.0), rel=1e-5)
    assert second["train/std"] != pytest.approx(np.exp(-0.5))
    # Two standard deviations that are nearly the same: the entropy follows from their mean
    assert second["train/entropy_loss"] == pytest.approx(
        -(np.log(2 * np.pi * np.e) + 2 * np.log(second["train/std"])), abs=1e-3
    )


def discounted_sums(batch, gamma):
    """Return the discounted reward-to-go of each step, by its definition."""
    return np.concatenate(
        [[(gamma ** np.arange(len(rewards) - t) * rewards[t:]).sum() for t in range(len(rewards))] for rewards in batch]
    )


def test_policy_loss_and_grad_norm():
    kwargs = dict(normalize_advantage=False, baseline=None, target_kl=None, learning_rate=0.0)
    model = unequal_model(**kwargs)
    (log,), (batch,) = learn(model, total_timesteps=1)
    samples = batch_of(model)
    _, log_probs, _ = model.policy.evaluate_actions(samples.observations, samples.actions)
    expected = -(discounted_sums(batch, model.gamma) * log_probs.detach().numpy()).sum() / 6
    assert log["train/policy_loss"] == pytest.approx(expected, rel=1e-4)
    assert log["train/approx_kl"] == 0

    # The norm that is logged is that before clipping
    clipped_model = unequal_model(max_grad_norm=1e-3, **kwargs)
    gradients = record_gradients(clipped_model)
    (clipped_log,), _ = learn(clipped_model, total_timesteps=1)
    assert clipped_log["train/grad_norm"] == log["train/grad_norm"] > 1e-3
    assert np.linalg.norm(vector_of(gradient_of(model))) == pytest.approx(log["train/grad_norm"], rel=1e-3)
    assert np.linalg.norm(vector_of(gradients[0])) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("normalize_value", [True, False])
def test_value_loss(normalize_value):
    """The loss is in the squared unit of the returns, whatever the scale of the critic's output."""
    model = unequal_model(
        baseline="value", normalize_value=normalize_value, n_value_epochs=1, learning_rate=0.0, value_learning_rate=0.0
    )
    (log,), (batch,) = learn(model, total_timesteps=1)
    samples = batch_of(model)
    values = model.policy.predict_values(samples.observations).flatten().detach().numpy()
    returns = discounted_sums(batch, model.gamma)
    if normalize_value:
        values = returns.mean() + returns.std() * values
    assert log["train/value_loss"] == pytest.approx(((values - returns) ** 2).mean(), rel=1e-3)


@pytest.mark.parametrize("target_kl", [None, 0.01])
def test_learning_rate(target_kl):
    """Without a target divergence, the given learning rate is logged; with one, that which the optimizer gets."""
    model = unequal_model(learning_rate=3e-3, target_kl=target_kl)
    logs, _ = learn(model, total_timesteps=5 * N_TIMESTEPS)
    learning_rates = [log["train/learning_rate"] for log in logs]
    assert model.policy.optimizer.param_groups[0]["lr"] == learning_rates[-1]
    assert learning_rates[0] == 3e-3
    assert (learning_rates == [3e-3] * 5) == (target_kl is None)
    if target_kl is not None:
        assert all(log["train/approx_kl"] <= 2 * target_kl for log in logs)


def test_learning_rate_grows_while_the_target_is_far():
    logs, _ = learn(unequal_model(learning_rate=1e-4, target_kl=10.0), total_timesteps=4 * N_TIMESTEPS)
    assert (np.diff([log["train/learning_rate"] for log in logs]) > 0).all()
