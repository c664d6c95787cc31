import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_reinforce import REINFORCE
from tests.envs import NoisyImageEnv, RecordVec, SpacesEnv
from tests.helpers import batch_of, changed, clone, critic_names, make_model

BOX = spaces.Box(-1, 1, (2,))


def learn(observation_space, action_space, **kwargs):
    """Learn from two episodes of each of two environments, and return the model, the record of the steps and the batch."""
    env = RecordVec(DummyVecEnv([lambda: SpacesEnv(observation_space, action_space)] * 2))
    # Samples that are wide of the bounds
    policy_kwargs = {"log_std_init": 1.0, **kwargs.pop("policy_kwargs", {})}
    model = make_model(env, policy_kwargs=policy_kwargs, **kwargs)
    before = clone(model)
    model.learn(16)
    assert changed(model, before)
    return model, env, batch_of(model)


def log_prob(model, batch):
    actions = batch.actions.flatten() if isinstance(model.action_space, spaces.Discrete) else batch.actions.float()
    return model.policy.evaluate_actions(batch.observations, actions)[1]


@pytest.mark.parametrize(
    "space, dtype",
    [
        (spaces.Box(-1, 1, (3,)), np.float32),
        (spaces.Box(-1, 1, (2, 3), dtype=np.float64), np.float32),
        (spaces.Box(0, 255, (4,), dtype=np.uint8), np.float32),
        (spaces.Discrete(3), np.int64),
        (spaces.MultiDiscrete([2, 3]), np.int64),
        (spaces.MultiBinary(3), np.int8),
        (spaces.MultiBinary([2, 2]), np.int8),
    ],
    ids=str,
)
def test_observation_spaces(space, dtype):
    model, env, batch = learn(space, BOX)
    observations = batch.observations.numpy()
    assert observations.dtype == dtype
    np.testing.assert_array_equal(observations, env.of_batch(env.observations, [2, 2]).astype(dtype))
    assert log_prob(model, batch).isfinite().all()
    action, _ = model.predict(space.sample())
    assert BOX.contains(action)


@pytest.mark.parametrize("channel_first", [False, True])
def test_image(channel_first):
    env = NoisyImageEnv(screen_height=36, screen_width=40, n_channels=3, channel_first=channel_first)
    model = make_model(env, "CnnPolicy", n_episodes=2)
    before = clone(model)
    batch = batch_of(model.learn(20))
    assert changed(model, before) == before.keys() - critic_names(model)
    assert batch.observations.shape == (20, 3, 36, 40)
    assert batch.observations.dtype == th.uint8
    assert log_prob(model, batch).isfinite().all()
    action, _ = model.predict(env.observation_space.sample())
    assert env.action_space.contains(action)


@pytest.mark.parametrize("algorithm", [PPO, REINFORCE])
@pytest.mark.parametrize(
    "space, error, match",
    [(spaces.Box(-1, 1, ()), IndexError, "out of range"), (spaces.Discrete(3, start=3), RuntimeError, "num_classes")],
    ids=["0-d Box", "Discrete with a start"],
)
def test_observation_spaces_that_sb3_does_not_support(algorithm, space, error, match):
    with pytest.raises(error, match=match):
        algorithm("MlpPolicy", SpacesEnv(space, BOX), device="cpu").learn(4)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, 1, ()),
        spaces.Box(-1, 1, (1,)),
        spaces.Box(-1, 1, (3,)),
        spaces.Box(-1, 1, (2, 3)),
        spaces.Box(np.array([-1, 0.25]), np.array([0.5, 3]), dtype=np.float64),
    ],
    ids=str,
)
def test_box_actions(space):
    model, env, batch = learn(BOX, space)
    sampled = batch.actions.numpy().reshape(-1, *space.shape)
    received = env.of_batch(env.actions, [2, 2])
    assert ((sampled < space.low) | (sampled > space.high)).any()
    np.testing.assert_array_equal(received, np.clip(sampled, space.low, space.high))
    assert received.shape == (16, *space.shape)
    assert np.all([(space.low <= actions) & (actions <= space.high) for actions in env.actions])
    assert log_prob(model, batch).isfinite().all()
    for deterministic in (False, True):
        action, _ = model.predict(BOX.sample(), deterministic=deterministic)
        assert space.contains(action)


def test_squashed_actions():
    space = spaces.Box(np.float32([-1, 0.25]), np.float32([0.5, 3]))
    model, env, batch = learn(BOX, space, use_sde=True, policy_kwargs=dict(squash_output=True))
    sampled = batch.actions.numpy()
    assert (np.abs(sampled) <= 1).all()
    received = env.of_batch(env.actions, [2, 2])
    np.testing.assert_allclose(received, space.low + (sampled + 1) / 2 * (space.high - space.low), rtol=1e-5, atol=1e-6)
    assert log_prob(model, batch).isfinite().all()


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(3),
    ],
    ids=str,
)
def test_discrete_actions(space):
    model, env, batch = learn(BOX, space)
    received = env.of_batch(env.actions, [2, 2])
    np.testing.assert_array_equal(batch.actions.numpy().reshape(16, -1), received.reshape(16, -1))
    assert all(space.contains(action) for step in env.actions for action in step)
    assert len(np.unique(received)) > 1
    assert log_prob(model, batch).isfinite().all()
    for deterministic in (False, True):
        action, _ = model.predict(BOX.sample(), deterministic=deterministic)
        assert space.contains(action)
