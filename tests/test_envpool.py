"""``EnvPoolVecEnv`` does what ``DummyVecEnv`` with ``Monitor`` does."""

import csv
import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import yaml
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import VecFrameStack, VecMonitor, VecNormalize

from sb3_reinforce import REINFORCE
from sb3_reinforce.vec_env import EnvPoolVecEnv

ENV_ID = "InvertedPendulum-v4"
SAME = [ENV_ID, "InvertedPendulum-v5", "Hopper-v4", "Ant-v5", "Reacher-v5", "CartPole-v1", "Pendulum-v1", "FrozenLake-v1"]


def zeros(env):
    return np.zeros((env.num_envs, *env.action_space.shape), env.action_space.dtype)


def random_actions(env, seed, n_steps):
    env.action_space.seed(seed)
    return [np.array([env.action_space.sample() for _ in range(env.num_envs)]) for _ in range(n_steps)]


def play(env, actions):
    """Play the actions, and return observations, rewards and dones."""
    obs = env.reset()
    steps = [env.step(action)[:3] for action in actions]
    return np.array([obs, *(step[0] for step in steps)]), *(np.array([step[i] for step in steps]) for i in (1, 2))


def assert_same_trajectories(one, other):
    for x, y in zip(one, other, strict=True):
        np.testing.assert_array_equal(x, y)


def kinds(value):
    """Return types, dtypes, shapes and keys of a nested structure, without its values."""
    if isinstance(value, dict):
        return {key: kinds(element) for key, element in value.items()}
    if isinstance(value, list):
        return list(map(kinds, value))
    return (
        (value.dtype, value.shape) if isinstance(value, np.ndarray) else bool if isinstance(value, np.bool_) else type(value)
    )


@pytest.mark.parametrize("env_id", [ENV_ID, "CartPole-v1", "Pendulum-v1"])
def test_steps_look_as_those_of_dummy_vec_env(env_id):
    kwargs = dict(env_kwargs=dict(max_episode_steps=30)) if env_id == "Pendulum-v1" else {}
    dummy = make_vec_env(env_id, n_envs=3, seed=0, **kwargs)
    pool = EnvPoolVecEnv(env_id, n_envs=3, seed=0, **kwargs.get("env_kwargs", {}))
    assert kinds(pool.reset()) == kinds(dummy.reset())
    assert kinds(pool.reset_infos) == kinds(dummy.reset_infos)
    seen = {}
    for env in (dummy, pool):
        seen[env] = {}
        for actions in random_actions(env, 0, 200):
            obs, rewards, dones, infos = env.step(actions)
            for done, info in zip(dones, infos, strict=True):
                seen[env][bool(done)] = kinds([obs, rewards, dones]), kinds(info)
            assert kinds(env.reset_infos) == [{}] * 3
    assert seen[pool] == seen[dummy]
    assert seen[pool].keys() == {False, True}


def test_episode_ends_as_in_dummy_vec_env():
    """Both start from the same states, and get the same actions until all pendulums have fallen once."""
    pool, dummy = EnvPoolVecEnv(ENV_ID, n_envs=4, seed=1), make_vec_env(ENV_ID, n_envs=4)
    obs = pool.reset()
    dummy.reset()
    for env, state in zip(dummy.envs, obs, strict=True):
        env.unwrapped.set_state(state[:2], state[2:])
    fallen = np.zeros(4, dtype=bool)
    for actions in random_actions(pool, 2, 60):
        of_pool, of_dummy = pool.step(actions), dummy.step(actions)
        for i in np.flatnonzero(~fallen):
            rows = [[x[i] for x in step] for step in (of_pool, of_dummy)]
            assert rows[0][1:3] == rows[1][1:3]
            infos = [row[3] for row in rows]
            if rows[0][2]:
                last = [info.pop("terminal_observation") for info in infos]
                np.testing.assert_array_equal(*last)
                assert np.abs(last[0]).max() > 0.2
                for info in infos:
                    info["episode"].pop("t")
                assert np.abs(rows[0][0]).max() <= 0.01  # A first observation
            else:
                np.testing.assert_array_equal(rows[0][0], rows[1][0])
            assert infos[0] == infos[1]
        fallen |= of_pool[2]
    assert fallen.all()


def test_time_limit():
    pool = EnvPoolVecEnv("Pendulum-v1", n_envs=2, seed=0)
    pool.reset()
    total = np.zeros(2)
    for step in range(1, 401):
        _, rewards, dones, infos = pool.step(zeros(pool))
        total += rewards
        assert dones.tolist() == [step % 200 == 0] * 2
        assert [info["TimeLimit.truncated"] for info in infos] == [step % 200 == 0] * 2
        if dones.any():
            assert [info["episode"]["l"] for info in infos] == [200, 200]
            np.testing.assert_allclose([info["episode"]["r"] for info in infos], total, atol=1e-6)
            total[:] = 0
    assert pool.get_attr("spec")[1].max_episode_steps == 200


def test_terminated_at_the_time_limit_is_not_truncated():
    def last_info(**kwargs):
        pool = EnvPoolVecEnv("CartPole-v1", seed=0, **kwargs)
        pool.reset()
        for _ in range(100):
            _, _, dones, infos = pool.step([1])
            if dones[0]:
                return infos[0]["episode"]["l"], infos[0]["TimeLimit.truncated"]

    length, truncated = last_info()
    assert not truncated
    assert last_info(max_episode_steps=length) == (length, False)
    assert last_info(max_episode_steps=length - 1) == (length - 1, True)


def test_infos_and_arrays_are_fresh():
    pool = EnvPoolVecEnv(ENV_ID, n_envs=2, seed=0)
    obs = [pool.reset()]
    infos = []
    for _ in range(40):
        step = pool.step(zeros(pool) + 1)
        obs.append(step[0])
        infos += [*step[3], *(info["terminal_observation"] for info in step[3] if "episode" in info)]
    assert len(set(map(id, infos))) == len(infos) > 80
    assert not any(np.shares_memory(x, y) for x in obs for y in obs if x is not y)


def test_reset_forgets_the_running_episodes():
    pool = EnvPoolVecEnv("Pendulum-v1", n_envs=2, seed=0, max_episode_steps=5)
    for _ in range(2):
        pool.reset()
        for step in range(8):
            _, _, dones, infos = pool.step(zeros(pool))
            assert dones.tolist() == [step == 4] * 2
            if dones[0]:
                assert infos[0]["episode"]["l"] == 5
    pool.reset()
    pool.step_async(zeros(pool))
    pool.reset()  # Cancels the step
    assert [pool.step(zeros(pool))[2][0] for _ in range(5)] == [False] * 4 + [True]


def test_seed():
    pool = EnvPoolVecEnv(ENV_ID, n_envs=3, seed=7)
    actions = random_actions(pool, 0, 60)
    first = play(pool, actions)
    assert first[2].any()
    assert_same_trajectories(play(EnvPoolVecEnv(ENV_ID, n_envs=3, seed=7, num_threads=1), actions), first)
    again = play(pool, actions)
    assert not np.isin(again[0][0], first[0][0]).any()  # Other episodes
    assert list(pool.seed(7)) == [7, 8, 9]
    assert_same_trajectories(play(pool, actions), first)
    # Environment i has the seed + i
    np.testing.assert_array_equal(EnvPoolVecEnv(ENV_ID, n_envs=2, seed=8).reset(), first[0][0][1:])
    unseeded = [EnvPoolVecEnv(ENV_ID).reset() for _ in range(2)]
    assert not np.isin(*unseeded).any()


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1])
def test_seeds_of_every_size(seed):
    pools = [EnvPoolVecEnv(ENV_ID, n_envs=2, seed=seed) for _ in range(2)]
    np.testing.assert_array_equal(pools[0].reset(), pools[1].reset())
    assert len(np.unique(pools[0].reset())) == 8


def test_step_only():
    pool, whole = (EnvPoolVecEnv(ENV_ID, n_envs=4, seed=3, num_threads=2) for _ in range(2))
    obs = pool.reset()
    whole.reset()
    pool.step_only(np.array([3, 1]))
    ends = 0
    for actions in random_actions(pool, 0, 60):
        last = obs
        obs, rewards, dones, infos = pool.step(actions)
        expected = whole.step(actions)
        assert (rewards.dtype, dones.dtype) == (np.float32, bool)
        for array, all_stepped in zip((obs, rewards, dones), expected, strict=False):
            np.testing.assert_array_equal(array[[1, 3]], all_stepped[[1, 3]])
        np.testing.assert_array_equal(obs[[0, 2]], last[[0, 2]])
        assert rewards[[0, 2]].tolist() == [0, 0] and dones[[0, 2]].tolist() == [False, False]
        assert infos[0] == infos[2] == {}
        for i in (1, 3):
            assert infos[i].keys() == expected[3][i].keys()
            if dones[i]:
                ends += 1
                assert infos[i]["episode"]["l"] == expected[3][i]["episode"]["l"]
                np.testing.assert_array_equal(infos[i]["terminal_observation"], expected[3][i]["terminal_observation"])
    assert ends > 2
    pool.reset()
    assert pool.step(zeros(pool))[1].tolist() == [1, 1, 1, 1]
    pool.step_only([0])
    assert pool.step(zeros(pool))[1].tolist() == [1, 0, 0, 0]
    pool.step_only(range(4))
    assert pool.step(zeros(pool))[1].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("env_id", SAME)
def test_spaces_and_time_limit_are_those_of_gymnasium(env_id):
    env = gym.make(env_id)
    pool = EnvPoolVecEnv(env_id, n_envs=2)
    assert (pool.observation_space, pool.action_space) == (env.observation_space, env.action_space)
    assert (pool.spec.id, pool.spec.max_episode_steps) == (env_id, env.spec.max_episode_steps)
    assert pool.reset().dtype == env.observation_space.dtype
    obs = pool.step(np.array([pool.action_space.sample() for _ in range(2)]))[0]
    assert all(pool.observation_space.contains(x) for x in obs)


@pytest.mark.parametrize("env_id", [ENV_ID, "InvertedPendulum-v5", "HumanoidStandup-v4"])
def test_task_is_that_of_gymnasium(env_id):
    env, pool = gym.make(env_id).unwrapped, EnvPoolVecEnv(env_id, seed=0)
    hidden = 0 if env_id.startswith("Inv") else 2  # Positions that are not observed
    for episode in range(3):
        env.reset()
        obs = pool.reset()[0]
        split = env.model.nq - hidden
        env.set_state(np.r_[np.zeros(hidden), obs[:split]], obs[split : split + env.model.nv])
        for action in random_actions(pool, episode, 50 if hidden == 0 else 2):
            expected, reward, terminated, _, _ = env.step(action[0])
            obs, rewards, dones, infos = pool.step(action)
            np.testing.assert_allclose(rewards[0], reward, rtol=1e-4)
            assert dones[0] == terminated
            obs = infos[0]["terminal_observation"] if terminated else obs[0]
            np.testing.assert_allclose(obs, expected, rtol=1e-3, atol=1e-8 if hidden == 0 else 0.1)
            if terminated:
                break


def test_time_limit_of_inverted_pendulum():
    pool = EnvPoolVecEnv(ENV_ID, seed=0)
    obs = pool.reset()
    for step in range(1, 1001):
        obs, _, dones, infos = pool.step((obs @ [[0.8], [14.0], [1.2], [2.5]]).astype(np.float32))
        assert dones[0] == (step == 1000), infos
    assert infos[0]["TimeLimit.truncated"]
    assert infos[0]["episode"]["r"] == infos[0]["episode"]["l"] == 1000


def test_settings_of_the_environment():
    wide, narrow = (EnvPoolVecEnv(ENV_ID, n_envs=50, seed=0, reset_noise_scale=scale) for scale in (0.1, 0.001))
    assert np.abs(wide.reset()).max() > 0.05 > 0.001 >= np.abs(narrow.reset()).max()
    assert wide.spec.kwargs["reset_noise_scale"] == 0.1


def test_info_of_the_environment_is_in_the_last_one():
    pool = EnvPoolVecEnv("Hopper-v5", n_envs=2, seed=0, info_keywords=("x_position",))
    pool.reset()
    ends = [info for _ in range(100) for info in pool.step(np.ones((2, 3), np.float32))[3] if "episode" in info]
    assert ends and all(info["x_position"] == info["episode"]["x_position"] != 0 for info in ends)
    assert "env_id" not in ends[0]


def test_records_in_a_file(tmp_path):
    pool = EnvPoolVecEnv("CartPole-v1", n_envs=2, seed=0, filename=str(tmp_path / "0"))
    pool.reset()
    records = [info["episode"] for _ in range(200) for info in pool.step(zeros(pool))[3] if "episode" in info]
    pool.close()
    assert (tmp_path / "0.monitor.csv").read_text().startswith('#{"t_start": ')
    results = load_results(str(tmp_path))
    assert results["r"].tolist() == [record["r"] for record in records]
    assert results["l"].tolist() == [record["l"] for record in records]


def test_attributes():
    pool = EnvPoolVecEnv(ENV_ID, n_envs=3)
    assert pool.render_mode is None
    assert pool.get_attr("render_mode") == [None] * 3
    assert [spec.id for spec in pool.get_attr("spec", [0, 2])] == [ENV_ID] * 2
    assert not pool.has_attr("action_masks")
    with pytest.raises(AttributeError, match="no attribute 'model'"):
        pool.get_attr("model")
    with pytest.raises(IndexError):
        pool.get_attr("spec", 3)
    with pytest.raises(NotImplementedError, match="'gravity' cannot be set"):
        pool.set_attr("gravity", 1)
    with pytest.raises(NotImplementedError, match="'set_state' cannot be called"):
        pool.env_method("set_state")
    with pytest.raises(NotImplementedError, match="no options"):
        pool.set_options({"low": 0})
    assert pool.env_is_wrapped(Monitor) == [True] * 3
    assert pool.env_is_wrapped(Monitor, 1) == [True]
    assert pool.env_is_wrapped(gym.wrappers.TimeLimit, [0, 1]) == [False] * 2
    with pytest.warns(UserWarning, match="no images"):
        assert pool.get_images() == [None] * 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(env_id="InvertedPendulum-v9"), r"no environment 'InvertedPendulum-v9', did you mean 'InvertedPendulum-v\d'"),
        (dict(env_id="not an id!"), "no environment 'not an id!'"),
        (dict(n_envs=0), "n_envs=0"),
        (dict(num_threads=0), "num_threads=0"),
        (dict(max_episode_steps=0.5), "max_episode_steps=0.5"),
        (dict(reset_noise=1), "'reset_noise' is no setting .* did you mean 'reset_noise_scale'"),
        (dict(batch_size=2), "'batch_size' is no setting"),
        (dict(reset_noise_scale="x"), "does not take {'reset_noise_scale': 'x'}"),
        (dict(env_id="AcrobotSwingup-v1"), "observation space of AcrobotSwingup-v1 is a Dict"),
        (dict(env_id="Go9x9-v1"), "2 players"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        EnvPoolVecEnv(**{"env_id": ENV_ID, **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("indices", [[], [3], [-1], [0, 0], [0.0], 0])
def test_bad_indices(indices):
    pool = EnvPoolVecEnv(ENV_ID, n_envs=3)
    pool.reset()
    with pytest.raises(ValueError, match="env_indices="):
        pool.step_only(indices)


def test_bad_steps():
    pool = EnvPoolVecEnv(ENV_ID, n_envs=3)
    with pytest.raises(RuntimeError, match="reset"):
        pool.step(zeros(pool))
    pool.reset()
    for shape in ((3,), (2, 1), (3, 2)):
        with pytest.raises(ValueError, match=r"shape \(.*\), it must be \(3, 1\)"):
            pool.step(np.zeros(shape, np.float32))
    pool.close()
    pool.close()
    with pytest.raises(RuntimeError, match="reset"):
        pool.step(zeros(pool))


def test_without_envpool(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ImportError, match=r'pip install "sb3-reinforce\[envpool\]"'):
        EnvPoolVecEnv(ENV_ID)


@pytest.mark.parametrize("algo", [REINFORCE, A2C, PPO])
@pytest.mark.parametrize("env_id", [ENV_ID, "CartPole-v1"])
def test_algorithms(algo, env_id):
    kwargs = dict(n_steps=16, batch_size=32) if algo is PPO else {}
    model = algo("MlpPolicy", EnvPoolVecEnv(env_id, n_envs=4), seed=0, device="cpu", **kwargs).learn(300)
    assert model.num_timesteps >= 300
    assert {"r", "l", "t"} == model.ep_info_buffer[0].keys()


def test_environments_past_their_quota_are_left_alone():
    model = REINFORCE("MlpPolicy", EnvPoolVecEnv(ENV_ID, 4, seed=100), n_episodes=17, seed=100)
    for _ in range(3):
        before = model.num_timesteps
        model.learn(1, reset_num_timesteps=False)
        buffer = model.rollout_buffer
        assert model.num_timesteps - before == buffer.n_steps == buffer.lengths.sum()
        assert [episode.env_idx for episode in buffer.episodes] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 5


def test_environments_past_their_quota_do_not_repeat_themselves_in_the_statistics():
    """With statistics of normalization, all environments are stepped, as other vectorized environments do."""
    env = VecNormalize(EnvPoolVecEnv(ENV_ID, 4, seed=100))
    model = REINFORCE("MlpPolicy", env, n_episodes=5, seed=100).learn(1)
    assert model.num_timesteps == 4 * max(model.rollout_buffer.lengths[-2:].sum(), *model.rollout_buffer.lengths[:3])
    # Those of all steps, of SB3's reset and that of the rollout
    assert env.obs_rms.count == pytest.approx(model.num_timesteps + 8, abs=0.01)


def test_wrappers_and_callbacks(tmp_path):
    env = VecFrameStack(VecNormalize(EnvPoolVecEnv(ENV_ID, n_envs=2)), 2)
    eval_env = VecFrameStack(VecNormalize(EnvPoolVecEnv(ENV_ID), training=False, norm_reward=False), 2)
    callbacks = [
        EvalCallback(eval_env, eval_freq=100, n_eval_episodes=3, log_path=str(tmp_path), verbose=0),
        CheckpointCallback(100, str(tmp_path)),
    ]
    REINFORCE("MlpPolicy", env, seed=0, device="cpu").learn(500, callback=callbacks)
    assert (tmp_path / "evaluations.npz").exists()
    loaded = REINFORCE.load(next(tmp_path.glob("rl_model_*.zip")), env=env)
    start = loaded.num_timesteps
    assert loaded.learn(100, reset_num_timesteps=False).num_timesteps >= start + 100


def test_vec_monitor(tmp_path):
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        env = VecMonitor(EnvPoolVecEnv(ENV_ID, n_envs=2, seed=0), str(tmp_path / "0"))
    REINFORCE("MlpPolicy", env, seed=0, device="cpu").learn(200)
    env.close()
    assert '"env_id": "InvertedPendulum-v4"' in (tmp_path / "0.monitor.csv").read_text()
    results = load_results(str(tmp_path))
    assert len(results) > 5 and (results["r"] == results["l"]).all()  # It is one point per step


@pytest.mark.slow
def test_policy_scores_the_same_in_gymnasium():
    model = REINFORCE("MlpPolicy", EnvPoolVecEnv(ENV_ID, n_envs=8), seed=100, device="cpu").learn(30_000)
    envs = EnvPoolVecEnv(ENV_ID, n_envs=10, seed=101), make_vec_env(ENV_ID, n_envs=10, seed=101)
    returns = [evaluate_policy(model, env, 60, return_episode_rewards=True, deterministic=False)[0] for env in envs]
    means = [np.mean(x) for x in returns]
    standard_error = np.sqrt(sum(np.var(x) / len(x) for x in returns))
    assert min(means) > 30  # An untrained policy reaches about 6
    assert abs(means[0] - means[1]) <= 4 * standard_error + 1


def train(folder, *arguments):
    """Run the command that trains, with EnvPool."""
    command = [sys.executable, "-m", "sb3_reinforce", "train", "--vec-env", "envpool", *arguments]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["reinforce", "ppo"])
def test_command(tmp_path, algo):
    budget = ("-n", "300", "--eval-freq", "100", "--eval-episodes", "1", "--seed", "0")
    params = ("-params", "n_envs:4", "normalize:True", "frame_stack:2", *(["n_steps:32"] if algo == "ppo" else []))
    env_id = "InvertedPendulum-v5"
    process = train(tmp_path, "--algo", algo, "--env", env_id, *budget, "--env-kwargs", "reset_noise_scale:0.02", *params)
    assert process.returncode == 0, process.stderr
    assert "not of the same type" not in process.stderr
    folder = tmp_path / f"logs/{algo}/{env_id}_1"
    with open(folder / "0.monitor.csv") as file:
        assert f'"env_id": "{env_id}"' in next(file)
        assert len(list(csv.DictReader(file))) == len(load_results(str(folder))) > 4
    assert {"evaluations.npz", f"{env_id}.zip"} <= {path.name for path in folder.iterdir()}
    assert (folder / env_id / "vecnormalize.pkl").exists()
    assert dict(yaml.unsafe_load((folder / env_id / "args.yml").read_text()))["vec_env"] == "envpool"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, message",
    [
        (("-params", "env_wrapper:'gymnasium.wrappers.NormalizeObservation'"), "env_wrapper wraps Gymnasium's environments"),
        (("--env-kwargs", "reset_noise:0.1"), "'reset_noise' is no setting"),
    ],
)
def test_command_refuses_before_anything_is_created(tmp_path, arguments, message):
    process = train(tmp_path, "--algo", "reinforce", "--env", ENV_ID, "-n", "100", *arguments)
    assert process.returncode == 1
    assert message in process.stderr and "Traceback" not in process.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_help_of_the_command(tmp_path):
    assert "{dummy,subproc,envpool}" in train(tmp_path, "--help").stdout
