import inspect
import math
from itertools import product

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.envs import IdentityEnvBox, SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_reinforce import REINFORCE
from tests.envs import CountEnv
from tests.helpers import changed, clone, critic_names, logged, make_model, weights

#: Baselines are also tried with returns that they are not made for
pytestmark = pytest.mark.filterwarnings("ignore:baseline=.* estimates the reward-to-go")

RETURNS = ("reward_to_go", "episode", "mean_reward_to_go")
BASELINES = (None, "mean", "leave_one_out", "timestep", "linear", "greedy", "value")


def recorded_schedule(learning_rates):
    """Make a schedule from 0.01 to zero that records what it returns."""

    def schedule(progress_remaining):
        assert 0 <= progress_remaining <= 1
        learning_rates.append(1e-2 * progress_remaining)
        return learning_rates[-1]

    return schedule


def test_defaults():
    model = REINFORCE("MlpPolicy", "InvertedPendulum-v4")
    assert model.n_envs == 1
    parameters = list(inspect.signature(model.learn).parameters.values())
    assert {parameter.name: parameter.default for parameter in parameters} == dict(
        total_timesteps=100_000,
        callback=None,
        log_interval=1,
        tb_log_name="REINFORCE",
        reset_num_timesteps=True,
        progress_bar=False,
    )
    before = clone(model)
    assert model.learn(total_timesteps=1) is model
    # Exactly one rollout and one update
    assert model._n_updates == 1
    assert model.rollout_buffer.n_episodes == 8
    assert model.num_timesteps == model.rollout_buffer.n_steps > 8
    assert changed(model, before) == before.keys()
    assert model.policy.optimizer.state_dict()["state"] == {}  # The natural gradient goes without
    assert [model.target_kl(progress) for progress in (1, 0)] == pytest.approx([0.05, 0.005])
    # The next one has 512 steps, if its episodes are as long
    n_episodes = math.ceil(512 / (model.num_timesteps / 8))
    model.learn(total_timesteps=1)
    assert model.rollout_buffer.n_episodes == n_episodes


@pytest.mark.parametrize(
    "kwargs, expected, others",
    [
        (
            dict(baseline="value"),
            dict(gae_lambda=0.97, time_limit="bootstrap"),
            [dict(gae_lambda=1.0), dict(time_limit="terminal")],
        ),
        (
            dict(baseline="value", returns="episode"),
            dict(gae_lambda=1.0, time_limit="bootstrap"),
            [dict(time_limit="terminal")],
        ),
        # Values that feed on themselves would grow and grow
        (dict(baseline="value", gamma=1.0), dict(gae_lambda=0.97, time_limit="terminal"), [dict(time_limit="bootstrap")]),
        (dict(baseline="timestep"), dict(gae_lambda=1.0, time_limit="terminal"), []),
        (dict(baseline=None, returns="episode"), dict(gae_lambda=1.0, time_limit="terminal"), []),
    ],
)
def test_what_none_stands_for(kwargs, expected, others):
    """Those are the defaults of the factor of the lambda-return and of the meaning of time limits."""

    def learn(**settings):
        return weights(make_model(CountEnv(truncate=True), **{**kwargs, **settings}).learn(40))

    left_out = dict(gae_lambda=None, time_limit=None)
    assert th.equal(learn(**left_out), learn(**expected))
    assert not any(th.equal(learn(**left_out), learn(**{**expected, **other})) for other in others)


def test_learns():
    model = make_model(DummyVecEnv([CountEnv] * 4), n_episodes=20).learn(4000)
    mean_reward, _ = evaluate_policy(model, DummyVecEnv([CountEnv] * 2), n_eval_episodes=4, warn=False)
    assert mean_reward > 0.9 * 10


@pytest.mark.parametrize(
    "returns, baseline, reduction, time_limit",
    [
        combination
        for combination in product(RETURNS, BASELINES, ("episode", "step"), ("terminal", "bootstrap", "discard"))
        if (combination[1] == "value" or combination[3] != "bootstrap") and combination[1::2] != ("greedy", "discard")
    ],
)
def test_combinations(returns, baseline, reduction, time_limit):
    # The episodes of the last environment are cut off by a time limit
    env = DummyVecEnv([lambda: CountEnv(3), lambda: CountEnv(4), lambda: CountEnv(6, truncate=True)])
    model = make_model(env, n_episodes=6, returns=returns, baseline=baseline, reduction=reduction, time_limit=time_limit)
    before = clone(model)
    model.learn(80 if baseline == "greedy" else 40)  # As many episodes again
    assert model._n_updates == 2
    assert model.rollout_buffer.n_episodes == (4 if time_limit == "discard" else 6)
    actor_names = before.keys() - critic_names(model)
    assert changed(model, before) == (before.keys() if baseline == "value" else actor_names)
    assert weights(model).isfinite().all()


@pytest.mark.parametrize("target_kl", [None, 0.1])
def test_schedule_by_the_start_of_the_batch(target_kl):
    """The progress is that at the start of the batch: the last one goes beyond the total."""
    learning_rates = []
    model = make_model(learning_rate=recorded_schedule(learning_rates), target_kl=target_kl)
    learning_rates.clear()
    model.learn(50)
    assert model.num_timesteps == 60
    assert learning_rates == pytest.approx([1e-2, 6e-3, 2e-3])
    # On top of what there was
    learning_rates.clear()
    model.learn(50, reset_num_timesteps=False)
    assert model.num_timesteps == 120
    assert learning_rates == pytest.approx([1e-2 * 50 / 110, 1e-2 * 30 / 110, 1e-2 * 10 / 110])


@pytest.mark.parametrize("total_timesteps, progress", [(1, 1), (50, 1 / 5), (60, 1 / 3)])
def test_linear_schedules(total_timesteps, progress):
    model = make_model(
        learning_rate=LinearSchedule(1e-2, 1e-4, 1.0),
        value_learning_rate=LinearSchedule(1e-3, 1e-5, 1.0),
        target_kl=None,
        baseline="value",
    )
    model.learn(total_timesteps)
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4 + progress * 0.99e-2)
    assert model.value_optimizer.param_groups[0]["lr"] == pytest.approx(1e-5 + progress * 0.99e-3)


def test_target_kl_schedule():
    """Where the target is zero, so is the step."""
    model = make_model(target_kl=LinearSchedule(0.1, 0.0, 1.0)).learn(40)
    model.target_kl = lambda progress: 0.0
    before = clone(model)
    model.learn(1)
    assert model._n_updates == 3
    for name, tensor in model.policy.state_dict().items():
        np.testing.assert_allclose(tensor, before[name], rtol=0, atol=1e-3)  # the divergence is in single precision


@pytest.mark.parametrize("env", [CountEnv, lambda: gym.make("CartPole-v1")])
def test_target_kl_with_a_step_that_is_much_too_large(env):
    """The step would lead to parameters that make no distribution; the next one is shorter."""
    model = make_model(env(), learning_rate=1e30)
    before = clone(model)
    model.learn(1)
    assert model._n_updates == 1
    assert not changed(model, before)
    model.learn(1, reset_num_timesteps=False)
    assert logged(model)["train/learning_rate"] < 1e30


def test_target_kl_without_signal():
    """The learning rate stays in reach while there is nothing to learn."""
    model = make_model(CountEnv(1, rewarded=False), n_episodes=2)
    with pytest.warns(UserWarning, match="All episodes of the first 10 updates had the same return, 0"):
        model.learn(2 * 200)
    model.set_env(CountEnv())
    before = clone(model)
    model.learn(100)
    assert changed(model, before) == before.keys() - critic_names(model)
    assert weights(model).isfinite().all()


def test_reset_num_timesteps():
    model = make_model().learn(30)
    assert (model.num_timesteps, model._n_updates) == (40, 2)
    model.learn(30, reset_num_timesteps=False)
    assert (model.num_timesteps, model._n_updates) == (80, 4)
    model.learn(30)
    assert (model.num_timesteps, model._n_updates) == (40, 6)


def test_predict():
    model = make_model(policy_kwargs=dict(log_std_init=2.0))
    observations = np.arange(6, dtype=np.float32).reshape(6, 1)
    actions, state = model.predict(observations, deterministic=True)
    assert actions.shape == (6, 2)
    assert state is None
    np.testing.assert_array_equal(model.predict(observations, deterministic=True)[0], actions)
    np.testing.assert_allclose(model.predict(observations[0], deterministic=True)[0], actions[0], rtol=1e-5)
    samples = np.array([model.predict(observations)[0] for _ in range(20)])
    assert len(np.unique(samples[:, 0, 0])) > 1
    assert samples.min() == -1 and samples.max() == 1


def test_predict_dict():
    env = SimpleMultiObsEnv()
    model = REINFORCE("MultiInputPolicy", env, n_episodes=2, seed=0).learn(1)
    observations = [env.observation_space.sample() for _ in range(3)]
    actions = [model.predict(observation, deterministic=True)[0] for observation in observations]
    assert all(env.action_space.contains(action.item()) for action in actions)
    batch = {key: np.stack([observation[key] for observation in observations]) for key in observations[0]}
    np.testing.assert_array_equal(model.predict(batch, deterministic=True)[0], actions)


def test_evaluate_policy():
    model = REINFORCE("MlpPolicy", "InvertedPendulum-v4", n_episodes=2, seed=0).learn(1)
    returns, lengths = evaluate_policy(model, model.get_env(), n_eval_episodes=3, return_episode_rewards=True)
    assert len(returns) == 3
    # It is one point per step
    assert returns == lengths
    # The environment was left in the middle of nowhere, the rollout starts over
    model.learn(1, reset_num_timesteps=False)
    assert model._n_updates == 2


class ModeExtractor(BaseFeaturesExtractor):
    """Dropout and batch norm, and a record of the modes it is called in."""

    def __init__(self, observation_space):
        super().__init__(observation_space, features_dim=8)
        self.layers = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.modes = []

    def forward(self, observations):
        self.modes.append((self.training, th.is_grad_enabled()))
        return self.layers(observations)


@pytest.mark.parametrize("baseline", ["timestep", "value"])
@pytest.mark.parametrize("share_features_extractor", [True, False])
def test_train_and_eval_mode(baseline, share_features_extractor):
    """Eval mode to act and to measure, train mode where there is a gradient."""
    policy_kwargs = dict(features_extractor_class=ModeExtractor, share_features_extractor=share_features_extractor)
    model = make_model(baseline=baseline, policy_kwargs=policy_kwargs)
    before = clone(model)
    extractor = model.policy.pi_features_extractor
    seen = []

    def callback(locals_, globals_):
        seen.append((set(extractor.modes), clone(model)))
        extractor.modes.clear()
        return True

    model.learn(40, callback=callback)
    assert len(seen) == 40
    # The second rollout comes after the first update, which comes after the twentieth step
    evaluation, update = {(False, False)}, {(False, False), (True, True)}
    if baseline == "value":
        # In eval mode: the parameters of the critic are found, and it is fitted to features that it does not change
        update.add((False, True))
    assert [modes for modes, _ in seen] == [evaluation] * 20 + [update] + [evaluation] * 19
    # Nothing but an update changes the statistics of batch norm
    for i, (_, state) in enumerate(seen):
        reference = before if i < 20 else seen[20][1]
        assert all(th.equal(tensor, reference[name]) for name, tensor in state.items())
    assert any("running_mean" in name for name in changed(model, before))

    # Without dropout, two predictions agree
    extractor.modes.clear()
    observations = np.ones((4, 1), dtype=np.float32)
    actions, _ = model.predict(observations, deterministic=True)
    np.testing.assert_array_equal(model.predict(observations, deterministic=True)[0], actions)
    assert set(extractor.modes) == evaluation


def test_target_kl_with_batch_norm():
    """The statistics of batch norm change the policy as well, and no step is small enough to undo that."""

    class FarEnv(CountEnv):
        def _observation(self):
            return 50 + super()._observation()

    model = make_model(FarEnv(), baseline=None, policy_kwargs=dict(features_extractor_class=ModeExtractor, net_arch=[]))
    nn.init.normal_(model.policy.action_net.weight)
    before = clone(model)
    model.learn(1)
    assert "action_net.weight" in changed(model, before)


@pytest.mark.parametrize("sde_sample_freq, n_samples", [(-1, 2), (4, 2 + 3), (1, 2 + 10)])
def test_sde_sample_freq(monkeypatch, sde_sample_freq, n_samples):
    """The noise is sampled at the start of an episode, here twice in ten steps, and every so many steps."""
    model = make_model(DummyVecEnv([CountEnv] * 3), n_episodes=6, use_sde=True, sde_sample_freq=sde_sample_freq)
    n_envs = []
    reset_noise = model.policy.reset_noise
    monkeypatch.setattr(model.policy, "reset_noise", lambda n: (n_envs.append(n), reset_noise(n)))
    before = clone(model)
    model.learn(60)
    assert n_envs == [3] * 2 * n_samples
    assert changed(model, before) == before.keys() - critic_names(model)


def test_sde_noise_is_a_function_of_the_state():
    """The same observation gets the same action throughout an episode, and another one in the next episode."""
    actions = []

    def callback(locals_, globals_):
        actions.append(locals_["actions"])
        return True

    env = CountEnv()
    same = gym.wrappers.TransformObservation(env, np.ones_like, env.observation_space)
    make_model(same, use_sde=True).learn(1, callback=callback)
    episodes = np.reshape(actions, (4, 5, 2))
    np.testing.assert_allclose(episodes, np.broadcast_to(episodes[:, :1], episodes.shape), rtol=1e-4, atol=1e-5)
    assert len(np.unique(episodes[:, 0, 0].round(4))) == 4


def test_squashed_sde():
    actions = []

    def callback(locals_, globals_):
        actions.append((locals_["actions"], locals_["clipped_actions"]))
        return True

    model = make_model(
        IdentityEnvBox(low=-2, high=6, ep_length=10),
        use_sde=True,
        policy_kwargs=dict(squash_output=True, log_std_init=1.0),
    )
    model.learn(40, callback=callback)
    raw, scaled = np.swapaxes(actions, 0, 1)
    assert np.abs(raw).max() <= 1
    np.testing.assert_allclose(scaled, 2 + 4 * raw, rtol=1e-5, atol=1e-5)
    assert model._n_updates == 1


@pytest.mark.parametrize("baseline", BASELINES[:-1])
@pytest.mark.parametrize("share_features_extractor", [True, False])
def test_no_critic(monkeypatch, baseline, share_features_extractor):
    """Without a baseline that is learned, the critic is never called and never changes."""

    def fail(*args):
        raise AssertionError("The critic was called")

    # Weight decay would change what has a gradient of zero rather than none
    policy_kwargs = dict(share_features_extractor=share_features_extractor, optimizer_kwargs=dict(weight_decay=0.1))
    model = make_model(baseline=baseline, policy_kwargs=policy_kwargs)
    monkeypatch.setattr(model.policy, "predict_values", fail)
    monkeypatch.setattr(model.policy.mlp_extractor, "forward_critic", fail)
    monkeypatch.setattr(model.policy.value_net, "forward", fail)
    before = clone(model)
    model.learn(120 if baseline == "greedy" else 60)
    model.predict(np.zeros(1, dtype=np.float32))
    assert model._n_updates == 3
    assert changed(model, before) == before.keys() - critic_names(model)
    monkeypatch.undo()  # The critic itself is found by its graph
    assert not model.value_optimizer.state


def test_critic_is_moved_by_its_own_optimizer_alone():
    """One full-batch step of Adam moves no parameter by more than its learning rate."""
    model = make_model(baseline="value", learning_rate=1e-2, value_learning_rate=1e-6, n_value_epochs=1)
    before = clone(model)
    model.learn(1)
    for name in critic_names(model):
        assert (model.policy.state_dict()[name] - before[name]).abs().max() < 2e-6, name
