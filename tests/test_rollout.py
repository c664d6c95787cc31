"""Rollouts on environments that break habits: starts in turn, shared arrays, dones of other types, subclassed spaces."""

from collections import Counter

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper

from sb3_reinforce import REINFORCE
from sb3_reinforce.resume import TrainingStateCallback
from tests.envs import CountEnv, SpacesEnv
from tests.helpers import PLAIN, Batches, sample_with_pytorch


class ListEnv(gym.Env):
    """Hand out nine problems in turn: each reset takes the next one. The observation shows its number."""

    observation_space = spaces.Box(0, 9, (1,))
    action_space = spaces.Discrete(2)

    def __init__(self, lengths):
        self.lengths, self.problem = lengths, -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.problem = (self.problem + 1) % 9
        self.time, self.length = 0, int(self.np_random.choice(self.lengths))
        return np.array([self.problem], dtype=np.float32), {}

    def step(self, action):
        self.time += 1
        return np.array([self.problem], dtype=np.float32), float(action), self.time == self.length, False, {}


@pytest.mark.parametrize(
    "n_envs, lengths, tolerance", [(1, [3], 1), (1, [2, 3, 4, 5], 1), (4, [3], 4), (4, [3, 4, 5, 6, 7], 40)]
)
@pytest.mark.filterwarnings("ignore:The policy has become deterministic")  # Which is right here
def test_each_problem_of_a_list_is_learned_from(n_envs, lengths, tolerance):
    """
    No reset uses up a problem: neither that of ``learn``, nor that of a rollout after the automatic one. Environments that
    are stepped on while they wait for the others do lose problems, but not always the same ones.
    """
    seen = Counter()

    def count(buffer):
        seen.update(int(episode.observations[0, 0]) for episode in buffer.episodes)

    env = DummyVecEnv([lambda: ListEnv(lengths)] * n_envs)
    REINFORCE("MlpPolicy", env, seed=0, **PLAIN).learn(3000, callback=Batches(count))
    assert len(seen) == 9 and sum(seen.values()) >= 450
    assert max(seen.values()) - min(seen.values()) <= tolerance


def test_runs_that_save_states_reset_before_each_rollout(tmp_path):
    """The start of an episode is out of reach of a training state, and a signal can have one saved after any update."""
    seen = []
    callbacks = [
        Batches(lambda buffer: seen.extend(int(episode.observations[0, 0]) for episode in buffer.episodes)),
        TrainingStateCallback(10_000, tmp_path),
    ]
    REINFORCE("MlpPolicy", DummyVecEnv([lambda: ListEnv([2])]), n_episodes=4, seed=0).learn(16, callback=callbacks)
    assert seen == [1, 2, 3, 4, 6, 7, 8, 0]


def test_locals_of_a2c():
    """What callbacks that were written for A2C read: unknown values are NaN, not zero and not missing."""
    seen = []

    class Read(BaseCallback):
        def _on_step(self):
            names = ("values", "log_probs", "rewards", "dones", "infos", "new_obs", "actions", "clipped_actions", "n_steps")
            seen.append({name: self.locals[name] for name in names})
            return True

        def _on_rollout_end(self):
            buffer = self.locals["rollout_buffer"]
            assert np.isnan(buffer.advantages).all() and np.isnan(buffer.returns).all()

    model = REINFORCE("MlpPolicy", DummyVecEnv([CountEnv] * 2), n_episodes=4, seed=0).learn(1, callback=Read())
    for found in seen:
        assert found["values"].shape == (2, 1) and found["values"].isnan().all()
        assert found["log_probs"].shape == (2,) and found["log_probs"].isnan().all()
        assert len(found["rewards"]) == len(found["infos"]) == len(found["actions"]) == 2
    assert np.isfinite(model.rollout_buffer.advantages).all() and np.isfinite(model.rollout_buffer.returns).all()


class SharedArray(VecEnvWrapper):
    """Write each observation into the same array."""

    def reset(self):
        self.array = self.venv.reset().copy()
        return self.array

    def step_wait(self):
        observation, rewards, dones, infos = self.venv.step_wait()
        self.array[:] = observation
        return self.array, rewards, dones, infos


def test_observations_may_be_overwritten_by_the_next_step():
    def check(buffer):
        np.testing.assert_array_equal(buffer.observations.ravel(), np.tile(np.arange(5), 4))

    env = SharedArray(DummyVecEnv([CountEnv] * 2))
    REINFORCE("MlpPolicy", env, n_episodes=4, seed=0).learn(50, callback=Batches(check))


class OtherDones(VecEnvWrapper):
    """Give the dones another type, and leave something out of the infos."""

    def __init__(self, venv, kind, left_out=None):
        super().__init__(venv)
        self.kind, self.left_out = kind, left_out

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        observation, rewards, dones, infos = self.venv.step_wait()
        infos = [{key: value for key, value in info.items() if key != self.left_out} for info in infos]
        return observation, rewards, self.kind(dones), infos


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.float32, list])
def test_dones_of_other_types(kind):
    convert = list if kind is list else lambda dones: dones.astype(kind)
    lengths = []
    env = OtherDones(DummyVecEnv([CountEnv] * 3), convert)
    model = REINFORCE("MlpPolicy", env, n_episodes=6, seed=0)
    model.learn(40, callback=Batches(lambda buffer: lengths.extend(buffer.lengths)))
    assert set(lengths) == {5} and len(lengths) % 6 == 0


def test_no_terminal_observation():
    """Only the critic needs it."""
    env = OtherDones(DummyVecEnv([lambda: CountEnv(truncate=True)]), np.asarray, left_out="terminal_observation")
    for kwargs in (dict(baseline="timestep"), dict(time_limit="terminal")):
        model = REINFORCE("MlpPolicy", env, n_episodes=2, seed=0, **kwargs).learn(10)
        assert [episode.terminal_observation for episode in model.rollout_buffer.episodes] == [None, None]
    for kwargs in ({}, dict(time_limit="bootstrap")):
        model = REINFORCE("MlpPolicy", env, n_episodes=2, seed=0, **kwargs)
        with pytest.raises(ValueError, match=r"Environment 0 gives no infos.'terminal_observation'.*time_limit='bootstrap'"):
            model.learn(10)


class Noise(BaseCallback):
    """Keep the noise matrix of each environment at each step, and when its episodes end."""

    def _on_training_start(self):
        self.noise, self.dones = [], []

    def _on_step(self):
        self.noise.append(self.model.policy.action_dist.exploration_matrices.detach().numpy().copy())
        self.dones.append(self.locals["dones"].copy())
        return True


@pytest.mark.parametrize("sampler", ["numpy", "pytorch"])
def test_noise_of_gsde_stays_for_an_episode(sampler, monkeypatch):
    """Whatever the other environments do: each has one noise for each of its episodes, and another one for the next."""
    if sampler == "pytorch":
        sample_with_pytorch(monkeypatch)
    lengths = (3, 12)
    env = DummyVecEnv([lambda length=length: CountEnv(length) for length in lengths])
    callback = Noise()
    REINFORCE("MlpPolicy", env, n_episodes=4, seed=0, use_sde=True).learn(1, callback=callback)
    noise, dones = np.array(callback.noise), np.array(callback.dones)
    assert len(noise) == 24
    for env_idx, length in enumerate(lengths):
        ends = np.flatnonzero(dones[:, env_idx])
        assert (np.diff(ends) == length).all()
        # The quota is two episodes: beyond that, an environment waits
        first, second = noise[:length, env_idx], noise[length : 2 * length, env_idx]
        assert (first == first[0]).all() and (second == second[0]).all()
        assert (first[0] != second[0]).any()
    assert (noise[0, 0] != noise[0, 1]).any()


class Steps(spaces.Discrete):
    pass


class Levers(spaces.Box):
    pass


@pytest.mark.parametrize("space", [Steps(3), Levers(-1, 1, (2,))])
def test_subclassed_action_space(space):
    env = SpacesEnv(spaces.Box(-1, 1, (2,)), space)
    model = REINFORCE("MlpPolicy", env, seed=0).learn(50)
    assert space.contains(model.predict(np.zeros(2, dtype=np.float32))[0])


@pytest.mark.parametrize("space", [spaces.Discrete(5, start=2), spaces.MultiDiscrete([3, 4], start=[1, 0])])
def test_actions_that_do_not_start_at_zero(space):
    """SB3's policies sample numbers from 0 on: the environment would get actions outside its space."""
    with pytest.raises(ValueError, match="do not start at 0, which is not supported"):
        REINFORCE("MlpPolicy", SpacesEnv(spaces.Box(-1, 1, (2,)), space))
