import os
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import optuna
import pytest
import yaml
from optuna.samplers import RandomSampler
from stable_baselines3.common.utils import FloatSchedule

from sb3_reinforce import REINFORCE
from sb3_reinforce.zoo.hyperparams import FOLDER, find_file, hyperparams, read_hyperparams
from sb3_reinforce.zoo.hyperparams_opt import convert_reinforce_params, sample_reinforce_params, target_kl_schedule
from tests.zoo_command import FORKSERVER

MUJOCO = "InvertedPendulum InvertedDoublePendulum Reacher Swimmer Hopper Walker2d HalfCheetah Ant Humanoid".split()
REQUIRED = {f"{name}-v{version}" for name in MUJOCO for version in (4, 5)}
REQUIRED |= {"CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCarContinuous-v0"}
# One of them has the default entry
ENV_IDS = sorted((hyperparams.keys() | REQUIRED | {"MountainCar-v0"}) - {"default"})
UPSTREAM = Path(find_spec("rl_zoo3").origin).parent / "hyperparams"
PEERS = {algo: (read_hyperparams(algo), yaml.safe_load((UPSTREAM / f"{algo}.yml").read_text())) for algo in ("ppo", "a2c")}


@pytest.fixture(scope="module")
def elsewhere():
    """:return: Calls a function in another process: to import RL Zoo changes the time limit of Gymnasium"""
    with ProcessPoolExecutor(1, FORKSERVER) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def register_twice():
    """:return: RL Zoo's tables before and after the first and the second time, and the algorithm in its modules"""
    import rl_zoo3
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

    from sb3_reinforce.zoo import register

    modules = [rl_zoo3, *(import_module(f"rl_zoo3.{name}") for name in ("exp_manager", "train", "enjoy"))]
    tables = (rl_zoo3.ALGOS, HYPERPARAMS_SAMPLER, HYPERPARAMS_CONVERTER)
    for table in tables:
        table.pop("reinforce", None)  # Of another test
    states = [[dict(table) for table in tables]]
    for _ in range(2):
        register()
        states.append([dict(table) for table in tables])
    return states, [module.ALGOS["reinforce"] for module in modules]


def manage(env_id, folder, algo="reinforce", optimize=False):
    """:return: An experiment as the command prepares it: its manager and, unless it is a search, the model"""
    from sb3_reinforce.zoo import register
    from sb3_reinforce.zoo.exp_manager import ExperimentManager

    register()
    os.chdir(folder)  # MuJoCo leaves a log
    manager = ExperimentManager(
        Namespace(), algo, env_id, str(folder), eval_freq=-1, optimize_hyperparameters=optimize, verbose=0, device="cpu"
    )
    model, _ = manager.setup_experiment() or (None, None)
    return manager, model


def set_up(env_id, folder, algo, keys=()):
    """:return: Where its hyperparameters come from, and what became of those"""
    manager, model = manage(env_id, folder, algo)
    normalize = model.get_vec_normalize_env()
    result = {key: getattr(model, key) for key in keys if hasattr(model, key)}
    if normalize is not None and not normalize.norm_reward:
        result["normalize"] = {"norm_reward": False}
    result["n_timesteps"] = manager.n_timesteps
    return manager.config, result


def shares_starts(folder, settings):
    """:return: Whether the environments of an experiment can be told their starts, for some settings of an entry"""
    import gymnasium as gym

    manager, _ = manage("CartPole-v1", folder)
    found = []
    for setting in settings:
        _, wrap, _, _ = manager._preprocess_hyperparams({"policy": "MlpPolicy", "n_timesteps": 10, **setting})
        env = gym.make("CartPole-v1")
        found.append((wrap(env) if wrap else env).has_wrapper_attr("queue_starts"))
    return found


def construct_sampled(env_id, folder):
    """:return: Number of trials of a search for which a model can be made"""
    manager, _ = manage(env_id, folder, optimize=True)
    env = manager.create_envs(manager.n_envs, no_log=True)
    study = optuna.create_study(sampler=RandomSampler(0))
    for _ in range(10):
        sampled = sample_reinforce_params(study.ask(), manager.n_actions, manager.n_envs, {})
        REINFORCE(env=env, **{**manager._hyperparams, **sampled})
    env.close()
    return len(study.trials)


def by_value(params):
    """:return: The parameters, with a number or a schedule as its values along a run"""
    schedules = params.keys() & {"learning_rate", "target_kl", "value_learning_rate"}
    return {**params, **{key: [FloatSchedule(params[key])(progress) for progress in (1, 0.5, 0)] for key in schedules}}


@pytest.mark.zoo
def test_register(elsewhere):
    (before, once, twice), algorithms = elsewhere(register_twice)
    additions = [{"reinforce": addition} for addition in (REINFORCE, sample_reinforce_params, convert_reinforce_params)]
    assert once == twice == [table | addition for table, addition in zip(before, additions, strict=True)]
    assert algorithms == [REINFORCE] * 4


@pytest.mark.zoo
def test_starts_are_shared_in_processes_too(elsewhere, tmp_path):
    """Those of a ``SubprocVecEnv`` are out of reach later."""
    settings = [{}, {"group_size": 2, "n_episodes": 8}, {"baseline": "greedy"}, {"baseline": "greedy", "group_size": 2}]
    assert elsewhere(shares_starts, tmp_path, settings) == [False, True, True, True]


def test_imports_without_rl_zoo():
    modules = "sb3_reinforce.zoo, sb3_reinforce.zoo.hyperparams, sb3_reinforce.zoo.hyperparams_opt"
    code = f"import sys, {modules}; sys.exit('rl_zoo3' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_mujoco_entries():
    """One setting for all but InvertedPendulum's budget and Swimmer's horizon, which is that of the entries, too."""
    shared = yaml.safe_load((FOLDER / "mujoco.yml").read_text())
    assert shared.keys() == {f"{name}-v{version}" for name in MUJOCO for version in (4, 5)}
    changes = {"Swimmer": {"gamma": 0.9999, "gae_lambda": 0.99}, "InvertedPendulum": {"n_timesteps": 1e5}}
    for env_id, setting in shared.items():
        assert setting == shared["HalfCheetah-v4"] | changes.get(env_id.partition("-")[0], {})
    entries = read_hyperparams("reinforce")
    assert all(entries[env_id] == setting for env_id, setting in shared.items() if "InvertedPendulum" not in env_id)


def test_file_by_name():
    assert find_file("mujoco") == str(FOLDER / "mujoco.yml")
    for name in (None, "mine.yml", "package.module", "hyperparams/mujoco"):
        assert find_file(name) == name


def test_target_kl_schedule():
    schedule = target_kl_schedule(0.3)
    assert schedule(1.0) == 0.3
    assert schedule(0.0) == pytest.approx(0.003)


@pytest.mark.parametrize("n_envs, fewest", [(1, 2), (2, 2), (3, 4), (4, 4), (64, 64), (100, 128)])
def test_sampled_number_of_episodes(n_envs, fewest):
    study = optuna.create_study(sampler=RandomSampler(0))
    sampled = [sample_reinforce_params(study.ask(), 1, n_envs, {})["n_episodes"] for _ in range(100)]
    assert set(sampled) == {n for n in (2, 4, 8, 16, 32, 64, 128) if fewest <= n <= max(fewest, 64)}
    assert [trial.user_attrs["n_episodes"] for trial in study.trials] == sampled


@pytest.mark.parametrize("env_id", ["InvertedPendulum-v4", "CartPole-v1"])
def test_sampled_params_are_accepted(env_id):
    env = gym.make(env_id)
    study = optuna.create_study(sampler=RandomSampler(0))
    for _ in range(40):
        trial = study.ask()
        sampled = sample_reinforce_params(trial, 1, 1, {})
        model = REINFORCE("MlpPolicy", env, **sampled)
        assert trial.user_attrs["gamma"] == model.gamma
        # As from a storage
        params = study.trials[-1].params
        assert by_value(convert_reinforce_params(params)) == by_value(sampled)
        assert params == study.trials[-1].params


def test_entries():
    assert REQUIRED | {"default"} <= hyperparams.keys()


@pytest.mark.zoo
@pytest.mark.parametrize("env_id", ENV_IDS)
def test_entry(elsewhere, tmp_path, env_id):
    """The model has what the entry says, or that of the default."""
    entry = hyperparams.get(env_id, hyperparams["default"]).copy()
    assert entry.pop("policy") == "MlpPolicy"
    config, result = elsewhere(set_up, env_id, tmp_path, "reinforce", list(entry))
    assert config == str(FOLDER / "reinforce.yml")
    for key in entry.keys() & {"normalize", "policy_kwargs"}:
        entry[key] = eval(entry[key])
    if isinstance(entry.get("target_kl"), str):
        entry["target_kl"] = target_kl_schedule(float(entry["target_kl"].removeprefix("lin_")))
    assert by_value({key: result.get(key) for key in entry}) == by_value(entry)


@pytest.mark.zoo
@pytest.mark.parametrize("env_id", ENV_IDS)
def test_entry_with_sampled_params(elsewhere, tmp_path, env_id):
    assert elsewhere(construct_sampled, env_id, tmp_path) == 10


def sources(algo, env_id):
    """:return: The ids under which RL Zoo may have settings for it, the first one first"""
    name = env_id.partition("-v")[0]
    return [f"{name}-v{version}" for version in (4, 2) if f"{name}-v{version}" in PEERS[algo][1]]


@pytest.mark.zoo
@pytest.mark.parametrize("algo, env_id", [(algo, env_id) for algo in PEERS for env_id in PEERS[algo][0]])
def test_settings_of_peers(elsewhere, tmp_path, algo, env_id):
    """They are RL Zoo's, under an id that it does not know."""
    ours, theirs = PEERS[algo]
    assert env_id not in theirs
    entries = []
    for entry in (ours[env_id], theirs[sources(algo, env_id)[0]]):
        entries.append({key: "".join(value.split()) if isinstance(value, str) else value for key, value in entry.items()})
    assert entries[0] == entries[1]
    config, result = elsewhere(set_up, env_id, tmp_path, algo)
    assert config == str(FOLDER / f"{algo}.yml")
    assert result["n_timesteps"] == ours[env_id]["n_timesteps"]


@pytest.mark.parametrize("algo", PEERS)
def test_settings_of_peers_are_complete(algo):
    ours, theirs = PEERS[algo]
    assert ours.keys() == {env_id for env_id in REQUIRED if env_id not in theirs and sources(algo, env_id)}


@pytest.mark.zoo
@pytest.mark.parametrize("algo, env_id", [("ppo", "Hopper-v4"), ("ppo", "CartPole-v1"), ("a2c", "Hopper-v4")])
def test_rl_zoo_has_the_first_word(elsewhere, tmp_path, algo, env_id):
    config, _ = elsewhere(set_up, env_id, tmp_path, algo)
    assert config == str(UPSTREAM / f"{algo}.yml")
