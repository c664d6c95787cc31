import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage

from sb3_reinforce import REINFORCE
from tests.envs import RecordVec, SpacesEnv
from tests.helpers import batch_of, changed, clone, make_model

VECTOR = spaces.Box(-5, 5, (3,), dtype=np.float64)
IMAGE = spaces.Box(0, 255, (36, 40, 1), dtype=np.uint8)
CELL = spaces.Discrete(4)
# Key: dtype in the batch
DTYPES = {"vector": np.float32, "image": np.uint8, "cell": np.int64}


def make_env(n_envs=1, **observation_spaces):
    env = SpacesEnv(spaces.Dict(observation_spaces or dict(vector=VECTOR, image=IMAGE, cell=CELL)), spaces.Box(-1, 1, (2,)))
    return DummyVecEnv([lambda: SpacesEnv(env.observation_space, env.action_space) for _ in range(n_envs)])


def learn(env, **kwargs):
    """Learn from two episodes of each environment, and return the model and the batch."""
    model = make_model(env, "MultiInputPolicy", n_episodes=2 * env.num_envs, policy_kwargs=dict(net_arch=[8]), **kwargs)
    before = clone(model)
    model.learn(1)
    assert changed(model, before)
    return model, batch_of(model)


def assert_batch_is_what_was_shown(batch, env, keys):
    assert batch.observations.keys() == set(keys)
    for key in keys:
        shown = env.of_batch([observation[key] for observation in env.observations], [2] * env.num_envs)
        stored = batch.observations[key].numpy()
        assert stored.dtype == DTYPES[key]
        np.testing.assert_array_equal(stored, shown.astype(DTYPES[key]))


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("baseline", ["timestep", "value"])
def test_dict_spaces(n_envs, baseline):
    env = RecordVec(VecTransposeImage(make_env(n_envs)))
    model, batch = learn(env, baseline=baseline)
    assert_batch_is_what_was_shown(batch, env, DTYPES)
    assert batch.observations["image"].shape == (8 * n_envs, 1, 36, 40)
    assert batch.observations["cell"].shape == (8 * n_envs,)
    _, log_prob, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
    assert log_prob.isfinite().all()
    action, _ = model.predict(env.observation_space.sample())
    assert env.action_space.contains(action)


def test_channel_last_images_are_transposed():
    env = RecordVec(make_env())
    _, batch = learn(env)
    shown = env.of_batch([observation["image"] for observation in env.observations], [2])
    np.testing.assert_array_equal(batch.observations["image"].numpy(), shown.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("n_envs", [1, 2])
def test_vec_frame_stack(n_envs):
    env = RecordVec(VecTransposeImage(VecFrameStack(make_env(n_envs, vector=VECTOR, image=IMAGE), n_stack=2)))
    _, batch = learn(env)
    assert_batch_is_what_was_shown(batch, env, ["vector", "image"])
    assert batch.observations["image"].shape == (8 * n_envs, 2, 36, 40)
    vectors = batch.observations["vector"].numpy().reshape(-1, 4, 2, 3)
    # Of two frames the older one is that of the step before, and zero at the start
    np.testing.assert_array_equal(vectors[:, 1:, 0], vectors[:, :-1, 1])
    assert not vectors[:, 0, 0].any()


def test_vec_normalize():
    normalize = VecNormalize(make_env(2), norm_obs_keys=["vector"])
    env = RecordVec(VecTransposeImage(normalize))
    _, batch = learn(env)
    assert_batch_is_what_was_shown(batch, env, DTYPES)
    assert normalize.obs_rms["vector"].count > 16
    # A uniform distribution on [-5, 5] in units of its standard deviation 2.9
    assert 1 < batch.observations["vector"].abs().max() < 3


def test_grid_world():
    env = SimpleMultiObsEnv(random_start=False)
    env.max_count = 5
    observations = batch_of(make_model(env, "MultiInputPolicy", n_episodes=2).learn(1)).observations
    assert observations["img"].shape == (12, 1, 64, 64)
    np.testing.assert_array_equal(observations["vec"][[0, 6]], np.float32([env.state_mapping[0]["vec"]] * 2))


@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy"])
def test_policies_for_arrays_are_refused(policy):
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        REINFORCE(policy, make_env(vector=VECTOR), device="cpu")
