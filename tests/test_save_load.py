import inspect
import io
import pathlib

import numpy as np
import pytest
import torch as th
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.envs import (
    FakeImageEnv,
    IdentityEnv,
    IdentityEnvBox,
    IdentityEnvMultiBinary,
    IdentityEnvMultiDiscrete,
    SimpleMultiObsEnv,
)
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import LinearSchedule, set_random_seed
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_reinforce import REINFORCE, CnnPolicy, MlpPolicy, MultiInputPolicy
from tests.envs import NoisyImageEnv
from tests.helpers import assert_same, count_envs, hidden_state, logged, make_model, weights, whole_episodes


@pytest.mark.parametrize("kind", ["str", "path", "bytes"])
def test_save_load_file_kinds(tmp_path, kind):
    file = {"str": str(tmp_path / "model"), "path": pathlib.Path(tmp_path / "model.zip"), "bytes": io.BytesIO()}[kind]
    model = make_model().learn(40)
    model.save(file)
    if kind == "bytes":
        file.seek(0)
    else:
        assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]
    assert_same(REINFORCE.load(file).get_parameters(), model.get_parameters())


@pytest.mark.parametrize(
    "policy, make_env, kwargs",
    [
        ("MlpPolicy", IdentityEnvBox, dict()),
        ("MlpPolicy", lambda: IdentityEnv(4), dict()),
        ("MlpPolicy", lambda: IdentityEnvMultiDiscrete(3), dict()),
        ("MlpPolicy", lambda: IdentityEnvMultiBinary(3), dict()),
        ("MlpPolicy", IdentityEnvBox, dict(use_sde=True)),
        ("MlpPolicy", IdentityEnvBox, dict(use_sde=True, policy_kwargs=dict(squash_output=True))),
        ("MlpPolicy", IdentityEnvBox, dict(policy_kwargs=dict(state_dependent_std=True))),
        ("MlpPolicy", IdentityEnvBox, dict(policy_kwargs=dict(state_dependent_std=True, std_net_arch=[8], min_std=0.1))),
        ("MlpPolicy", IdentityEnvBox, dict(baseline="value", policy_kwargs=dict(share_features_extractor=False))),
        (MlpPolicy, IdentityEnvBox, dict(policy_kwargs=dict(net_arch=[]))),
        ("CnnPolicy", lambda: NoisyImageEnv(screen_height=40, screen_width=40), dict(baseline="value")),
        ("MultiInputPolicy", lambda: SimpleMultiObsEnv(random_start=False), dict(baseline="value")),
    ],
)
def test_predictions_are_the_same_after_load(tmp_path, policy, make_env, kwargs):
    env = make_env()
    model = make_model(env, policy, n_episodes=2, **kwargs).learn(1)
    model.save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model", env=env)
    assert type(loaded.policy) is type(model.policy)
    observations = [env.observation_space.sample() for _ in range(5)]
    if policy == "MultiInputPolicy":
        observations = {key: np.stack([observation[key] for observation in observations]) for key in observations[0]}
    else:
        observations = np.stack(observations)
    for deterministic in (True, False):
        predictions = []
        for one in (model, loaded):
            set_random_seed(1)
            if one.use_sde:
                one.policy.reset_noise()
            predictions.append(one.predict(observations, deterministic=deterministic)[0])
        np.testing.assert_array_equal(*predictions)
    before = weights(loaded)
    loaded.learn(1)
    assert loaded._n_updates == 2
    assert not th.equal(weights(loaded), before)


def test_load_without_env(tmp_path):
    make_model().learn(40).save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model")
    assert loaded.get_env() is None
    loaded.set_env(count_envs())
    callback = whole_episodes()
    loaded.learn(40, callback=callback, reset_num_timesteps=False)
    assert len(callback.results) == 2
    assert loaded.num_timesteps == 80
    assert loaded._n_updates == 4


def test_load_continues_as_if_nothing_had_happened(tmp_path):
    kwargs = dict(baseline="value", learning_rate=LinearSchedule(1e-2, 1e-3, 1.0))
    model = make_model(**kwargs).learn(60)
    model.save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model", env=count_envs())
    for one in (model, loaded):
        set_random_seed(5)
        one.learn(60, reset_num_timesteps=False)
    assert model.num_timesteps == loaded.num_timesteps == 120
    assert_same(loaded.get_parameters(), model.get_parameters())


@pytest.mark.parametrize("n_envs, new_n_envs", [(1, 3), (3, 1), (2, 4)])
@pytest.mark.parametrize("by_set_env", [True, False])
def test_another_number_of_environments(tmp_path, n_envs, new_n_envs, by_set_env):
    model = make_model(count_envs(n_envs)).learn(1)
    before = weights(model)
    if by_set_env:
        model.set_env(count_envs(new_n_envs))
    else:
        model.save(tmp_path / "model")
        model = REINFORCE.load(tmp_path / "model", env=count_envs(new_n_envs))
    assert model.n_envs == new_n_envs
    assert th.equal(weights(model), before)
    callback = whole_episodes()
    model.learn(1, callback=callback)
    assert len(callback.results) == 1
    assert model.rollout_buffer.n_episodes == 4
    assert sorted({episode.env_idx for episode in model.rollout_buffer.episodes}) == list(range(new_n_envs))


def test_too_many_environments(tmp_path):
    """One episode per environment is the least, and None works with any number."""
    model = make_model(n_episodes=2)
    env = count_envs(3)
    with pytest.raises(ValueError, match="n_episodes=2"):
        model.set_env(env)
    assert model.n_envs == 1
    model.learn(1)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="n_episodes=2"):
        REINFORCE.load(tmp_path / "model", env=env)
    loaded = REINFORCE.load(tmp_path / "model", env=env, n_episodes=None).learn(1)
    # 512 steps are 103 episodes of five, rounded up to a multiple of three
    assert loaded.rollout_buffer.n_episodes == 105


def test_set_env_of_other_spaces():
    model = make_model()
    env = model.get_env()
    with pytest.raises(ValueError, match="spaces do not match"):
        model.set_env(IdentityEnvBox())
    assert model.get_env() is env


def test_set_env_with_vec_normalize():
    model = make_model().learn(1)
    env = VecNormalize(count_envs(2))
    model.set_env(env)
    assert model.get_vec_normalize_env() is env
    model.learn(1)
    assert env.obs_rms.count > 10


def test_custom_objects(tmp_path):
    model = make_model(learning_rate=lambda progress: 1e-2 * progress, target_kl=None).learn(40)
    model.save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model", env=count_envs(), custom_objects=dict(learning_rate=0.0))
    assert_same(loaded.get_parameters(), model.get_parameters())
    before = weights(loaded)
    loaded.learn(40)
    assert loaded._n_updates == 4
    assert th.equal(weights(loaded), before)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(n_episodes=7),
        dict(baseline="mean"),
        dict(baseline=None, returns="episode", reduction="step", gamma=0.5),
        dict(learning_rate=1e-5),
        dict(target_kl=None),
        dict(target_steps=31),
    ],
)
def test_load_with_other_arguments(tmp_path, kwargs):
    make_model().learn(40).save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model", env=count_envs(), **kwargs)
    for name, value in kwargs.items():
        assert getattr(loaded, name) == value
    loaded.learn(1)
    # The length of an episode, 5, is saved with the model
    assert loaded.rollout_buffer.n_episodes == (7 if "target_steps" in kwargs else kwargs.get("n_episodes", 4))
    assert loaded._n_updates == 3


@pytest.mark.parametrize("baseline, new_baseline", [("timestep", "value"), ("value", "timestep")])
def test_load_with_or_without_critic(tmp_path, baseline, new_baseline):
    model = make_model(baseline=baseline).learn(40)
    model.save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model", env=count_envs(), baseline=new_baseline)
    assert_same(loaded.policy.state_dict(), model.policy.state_dict())
    loaded.learn(1)
    assert loaded._n_updates == 3


def test_load_with_arguments_that_make_no_sense(tmp_path):
    make_model().save(tmp_path / "model")
    with pytest.raises(ValueError, match="time_limit='bootstrap' needs the critic"):
        REINFORCE.load(tmp_path / "model", time_limit="bootstrap")


def test_load_without_target_kl_uses_the_learning_rate_as_it_is(tmp_path):
    model = make_model(target_kl=0.01).learn(200)
    assert logged(model)["train/learning_rate"] != model.learning_rate
    model.save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model", env=count_envs(), target_kl=None, learning_rate=3e-3).learn(1)
    assert loaded.policy.optimizer.param_groups[0]["lr"] == 3e-3


def test_get_and_set_parameters(tmp_path):
    model = make_model(baseline="value").learn(40)
    parameters = model.get_parameters()
    assert parameters.keys() == {"policy", "policy.optimizer", "value_optimizer"}
    model.save(tmp_path / "model")
    for source in (parameters, str(tmp_path / "model.zip")):
        other = make_model(baseline="value", seed=1)
        assert not th.equal(weights(other), weights(model))
        other.set_parameters(source)
        assert_same(other.get_parameters(), parameters)


def test_set_parameters_in_part():
    parameters = make_model().learn(40).get_parameters()
    part = {"policy": {"log_std": th.full((2,), 0.25)}}
    other = make_model(seed=1)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.set_parameters(part)
    before = other.policy.action_net.weight.clone()
    other.set_parameters(part, exact_match=False)
    assert th.equal(other.policy.log_std, th.full((2,), 0.25))
    assert th.equal(other.policy.action_net.weight, before)
    with pytest.raises(ValueError, match="Names of parameters do not match"):
        other.set_parameters({"policy": parameters["policy"]})
    with pytest.raises(ValueError, match="invalid object name"):
        other.set_parameters({"no_such_name": parameters["policy"]}, exact_match=False)


def test_what_is_learned_comes_back(tmp_path):
    """Besides the parameters: states of the optimizers, statistics of the critic's targets, the learning rate's factor."""
    model = make_model(baseline="value", target_kl=0.01).learn(100)
    model.save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model")
    for optimizer, other in (
        (model.policy.optimizer, loaded.policy.optimizer),
        (model.value_optimizer, loaded.value_optimizer),
    ):
        assert len(optimizer.state_dict()["state"]) > 0
        assert_same(other.state_dict(), optimizer.state_dict())
    assert hidden_state(loaded) == hidden_state(model) != hidden_state(make_model())
    assert loaded._n_updates == model._n_updates == 5
    # Both go on alike, and the loaded model changes nothing in the other
    loaded.set_env(count_envs())
    model.set_env(count_envs())
    before = hidden_state(model)
    logs = []
    for one in (loaded, model):
        assert hidden_state(one) == before
        set_random_seed(5)
        one.learn(1, reset_num_timesteps=False)
        logs.append({key: value for key, value in logged(one).items() if not key.startswith("time/")})
    assert logs[0] == logs[1]
    assert hidden_state(loaded) == hidden_state(model) != before


def test_checkpoint_within_a_rollout(tmp_path):
    model = make_model(count_envs(2))
    model.learn(30, callback=CheckpointCallback(save_freq=13, save_path=str(tmp_path)))
    loaded = REINFORCE.load(tmp_path / "rl_model_26_steps", env=count_envs(2))
    assert loaded._n_updates == 1
    callback = whole_episodes()
    loaded.learn(20, callback=callback, reset_num_timesteps=False)
    assert len(callback.results) == 1
    assert loaded.num_timesteps == 46
    assert loaded._n_updates == 2


@pytest.mark.parametrize("schedule", [lambda progress: 0.1 * progress, LinearSchedule(0.1, 0.0, 1.0), 0.1])
def test_schedules(tmp_path, schedule):
    schedules = dict(learning_rate=schedule, value_learning_rate=schedule, target_kl=schedule, ent_coef=schedule)
    make_model(baseline="value", **schedules).learn(40).save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model", env=count_envs())
    for name in schedules:
        if callable(schedule):
            assert getattr(loaded, name)(0.5) == pytest.approx(0.05)
        else:
            assert getattr(loaded, name) == schedule
    assert loaded.lr_schedule(0.5) == pytest.approx(0.05 if callable(schedule) else 0.1)
    # The progress is that of the training to come
    loaded.learn(80)
    assert loaded._n_updates == 6
    assert loaded.value_optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 4 if callable(schedule) else 0.1)


class ScaledExtractor(FlattenExtractor):
    def __init__(self, observation_space, scale=1.0):
        super().__init__(observation_space)
        self.scale = nn.Parameter(th.tensor(scale))

    def forward(self, observations):
        return self.scale * super().forward(observations)


COMMON = dict(
    net_arch=dict(pi=[8], vf=[4]),
    activation_fn=nn.ReLU,
    ortho_init=False,
    log_std_init=-0.5,
    features_extractor_class=ScaledExtractor,
    features_extractor_kwargs=dict(scale=2.0),
    share_features_extractor=False,
    normalize_images=False,
    optimizer_class=th.optim.SGD,
    optimizer_kwargs=dict(momentum=0.5),
)


@pytest.mark.parametrize(
    "policy_kwargs",
    [
        dict(),
        dict(state_dependent_std=True),
        dict(state_dependent_std=True, std_net_arch=[6], min_std=0.05, **COMMON),
        dict(use_sde=True, full_std=False, use_expln=True, squash_output=True, **COMMON),
    ],
)
def test_policy_save_load(tmp_path, policy_kwargs):
    env = IdentityEnvBox()
    policy = MlpPolicy(env.observation_space, env.action_space, lambda _: 1e-3, **policy_kwargs)
    for parameter in policy.parameters():
        nn.init.normal_(parameter, std=0.1)
    policy.save(tmp_path / "policy")
    loaded = MlpPolicy.load(tmp_path / "policy")
    assert_same(loaded.state_dict(), policy.state_dict())
    assert str(loaded) == str(policy)
    for name, value in policy_kwargs.items():
        # SB3 keeps those of gSDE together
        loaded_value = loaded.dist_kwargs[name] if name in ("full_std", "use_expln") else getattr(loaded, name)
        assert loaded_value == value, name
    assert type(loaded.optimizer) is type(policy.optimizer)
    observations = th.rand(5, 1)
    policy.set_training_mode(False)
    loaded.set_training_mode(False)
    distribution, loaded_distribution = (one.get_distribution(observations).distribution for one in (policy, loaded))
    assert th.equal(distribution.mean, loaded_distribution.mean)
    assert th.equal(distribution.stddev, loaded_distribution.stddev)
    assert th.equal(policy.predict_values(observations), loaded.predict_values(observations))


@pytest.mark.parametrize(
    "policy_class, env",
    [
        (CnnPolicy, FakeImageEnv(screen_height=40, screen_width=40, channel_first=True, discrete=False)),
        (MultiInputPolicy, SimpleMultiObsEnv(discrete_actions=False, channel_last=False)),
    ],
)
@pytest.mark.parametrize("policy_kwargs", [dict(), dict(state_dependent_std=True, std_net_arch=[6])])
def test_policy_save_load_of_images_and_dicts(tmp_path, policy_class, env, policy_kwargs):
    policy = policy_class(env.observation_space, env.action_space, lambda _: 1e-3, **policy_kwargs)
    policy.save(tmp_path / "policy")
    loaded = policy_class.load(tmp_path / "policy")
    assert_same(loaded.state_dict(), policy.state_dict())
    observation = env.observation_space.sample()
    action, _ = policy.predict(observation, deterministic=True)
    loaded_action, _ = loaded.predict(observation, deterministic=True)
    np.testing.assert_array_equal(loaded_action, action)


@pytest.mark.parametrize("algorithm, name", [(PPO, "PPO"), (A2C, "A2C")])
def test_model_of_another_algorithm(algorithm, name, tmp_path):
    algorithm("MlpPolicy", "CartPole-v1", device="cpu").save(tmp_path / "model")
    with pytest.raises(ValueError, match=f"must be an EpisodeRolloutBuffer: a saved model that has it is one of .*{name}"):
        REINFORCE.load(tmp_path / "model")


@pytest.mark.parametrize(
    "name, hint",
    [
        ("n_steps", "n_episodes"),
        ("batch_size", "value_batch_size"),
        ("n_epochs", "n_value_epochs"),
        ("vf_coef", "critic"),
        ("clip_range_vf", "normalize_value"),
        ("use_rms_prop", "optimizer_class"),
        ("min_steps", "target_steps"),
    ],
)
def test_argument_of_another_algorithm(name, hint):
    with pytest.raises(TypeError, match=f"REINFORCE has no argument '{name}': .*{hint}"):
        REINFORCE("MlpPolicy", "CartPole-v1", **{name: 8})
    # Whoever asks for the arguments gets those of REINFORCE
    assert name not in inspect.signature(REINFORCE).parameters and "n_episodes" in inspect.signature(REINFORCE).parameters
