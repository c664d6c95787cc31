"""The search for hyperparameters, as it is started from a shell: ``sb3-reinforce train -optimize``."""

import csv
import pickle
import re

import optuna
import pytest
import yaml
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from stable_baselines3.common.utils import FloatSchedule

from sb3_reinforce import REINFORCE
from sb3_reinforce.zoo.hyperparams_opt import convert_reinforce_params
from tests.zoo_command import Started

pytestmark = pytest.mark.zoo

COMPLETE, PRUNED = TrialState.COMPLETE, TrialState.PRUNED
ENV_ID = "InvertedPendulum-v4"
BUDGET = ("--seed", "0", "-n", "300", "--n-trials", "2", "--n-evaluations", "2", "--eval-episodes", "1", "--no-optim-plots")
JOURNAL = ("--storage", "x.log", "--study-name", "s")
DATABASE = ("--storage", "sqlite:///x.db", "--study-name", "s")

PARAMETERS = {
    "n_episodes_pow",
    "one_minus_gamma",
    "natural_gradient",
    "learning_rate",
    "initial_target_kl",
    "normalize_advantage",
    "baseline",
    "net_arch",
    "activation_fn",
    "log_std_init",
}
OF_THE_CRITIC = {"one_minus_gae_lambda", "n_value_epochs", "value_learning_rate"}

# The instances are counted from the one of the set-up; then every trial has one to train and one to evaluate
DIVERGING = """
from itertools import count

import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv

instances = count()


class Diverging(CartPoleEnv):
    def __init__(self, diverging):
        super().__init__()
        self.diverges = next(instances) in diverging

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, float("nan") if self.diverges else reward, *rest


gym.register("Diverging-v0", Diverging, max_episode_steps=100)
"""


def start(folder, *arguments, env_id=ENV_ID):
    return Started(folder, "train", "--algo", "reinforce", "--env", env_id, *arguments)


def finish(*processes, status=0):
    """:return: What each process has printed"""
    outcomes = [process.finish() for process in processes]
    for actual, output, errors in outcomes:
        assert actual == status, output + errors
        assert "Traceback" not in errors
    return [output + errors for _, output, errors in outcomes]


def search(folder, *arguments, status=0, **kwargs):
    (output,) = finish(start(folder, "-optimize", *BUDGET, *arguments, **kwargs), status=status)
    return output


def journal(folder):
    return JournalStorage(JournalFileBackend(str(folder / "x.log")))


def new_study(storage):
    return optuna.create_study(storage=storage, study_name="s", direction="maximize")


def reported(folder):
    """:return: The study, and the rows of the table, that the search has written"""
    (table,) = folder.glob("logs/reinforce/report_*.csv")
    study = pickle.loads(table.with_suffix(".pkl").read_bytes())
    return study, list(csv.DictReader(table.read_text().splitlines()))


def by_value(params):
    """:return: The parameters, with a number or a schedule as its values along a run"""
    schedules = params.keys() & {"learning_rate", "target_kl", "value_learning_rate"}
    return {**params, **{key: [FloatSchedule(params[key])(progress) for progress in (1, 0.5, 0)] for key in schedules}}


def test_report(tmp_path):
    search(tmp_path, "-params", "n_envs:4", "normalize:True")
    study, rows = reported(tmp_path)
    assert [trial.state for trial in study.trials] == [COMPLETE] * 2
    assert [float(row["value"]) for row in rows] == [trial.value for trial in study.trials]
    for trial, row in zip(study.trials, rows, strict=True):
        assert trial.params.keys() == PARAMETERS | (OF_THE_CRITIC if trial.params["baseline"] == "value" else set())
        assert float(row["params_learning_rate"]) == trial.params["learning_rate"]
        # At least one episode per environment
        assert trial.distributions["n_episodes_pow"].low == 2
        assert int(row["user_attrs_n_episodes"]) == 2 ** trial.params["n_episodes_pow"] >= 4


def test_two_processes_share_a_journal(tmp_path):
    processes = [start(tmp_path, "-optimize", *BUDGET, *JOURNAL, "--seed", seed) for seed in "01"]
    one, other = (re.findall(r"Trial (\d+) finished", output) for output in finish(*processes))
    assert len(one) == len(other) == 2
    assert sorted(one + other) == list("0123")
    trials = optuna.load_study(storage=journal(tmp_path), study_name="s").trials
    assert [(trial.number, trial.state) for trial in trials] == [(number, COMPLETE) for number in range(4)]


def test_trials_of_a_database_are_replayed(tmp_path):
    storage = RDBStorage(f"sqlite:///{tmp_path / 'x.db'}")
    study = new_study(storage)
    for baseline in ("value", "leave_one_out"):
        study.enqueue_trial({"baseline": baseline})
    search(tmp_path, *DATABASE)
    trials = study.trials
    storage.remove_session()
    storage.engine.dispose()
    assert [trial.params["baseline"] for trial in trials] == ["value", "leave_one_out"]

    replays = ((0, {}, []), (0, {"gamma": 0.5}, ["-params", "gamma:0.5"]), (1, {}, []))
    # All at once: they take a while
    processes = [
        start(tmp_path, "-n", "1", *DATABASE, "--trial-id", str(number), "-f", str(i), *arguments)
        for i, (number, _, arguments) in enumerate(replays)
    ]
    finish(*processes)
    for i, (number, given, _) in enumerate(replays):
        path = tmp_path / str(i) / "reinforce" / f"{ENV_ID}_1" / ENV_ID
        expected = by_value({**convert_reinforce_params(trials[number].params), **given})
        model = REINFORCE.load(f"{path}.zip")
        assert by_value({key: getattr(model, key) for key in expected}) == expected
        config = dict(yaml.unsafe_load((path / "config.yml").read_text()))
        assert by_value(config) == {**expected, "policy": "MlpPolicy", "n_timesteps": 1e5}


def test_pruning(tmp_path):
    """What is worse than the trials so far at the first evaluation ends there."""
    values = {step: 1e6 for step in range(1, 100)}
    study = new_study(journal(tmp_path))
    study.add_trial(optuna.trial.create_trial(value=1e6, intermediate_values=values))
    search(tmp_path, *JOURNAL, "--pruner", "median", "--n-startup-trials", "1")
    assert [trial.state for trial in study.trials] == [COMPLETE, PRUNED, PRUNED]
    assert [list(trial.intermediate_values) for trial in study.trials[1:]] == [[1], [1]]


@pytest.fixture
def diverging(tmp_path):
    (tmp_path / "diverging.py").write_text(DIVERGING)
    return tmp_path, "--gym-packages", "diverging", "--env-kwargs"


def test_diverging_trial_is_pruned(diverging):
    output = search(*diverging, "diverging:[1]", env_id="Diverging-v0")
    assert "The reward of environment 0 at step 0 of the rollout is not finite" in output
    study, _ = reported(diverging[0])
    assert [trial.state for trial in study.trials] == [PRUNED, COMPLETE]


def test_all_trials_diverge(diverging):
    output = search(*diverging, "diverging:range(100)", env_id="Diverging-v0", status=1)
    assert len(re.findall(r"Trial \d+ pruned", output)) == 2
    assert output.splitlines()[-1].startswith("sb3-reinforce train: error: ")


def test_sampled_argument_that_does_not_go_with_a_given_one(tmp_path):
    """It ends that trial, not the search."""
    study = new_study(journal(tmp_path))
    for baseline in ("value", "leave_one_out"):  # With lambda < 1, the critic is for the reward-to-go only
        study.enqueue_trial({"baseline": baseline})
    search(tmp_path, *JOURNAL, "-params", "returns:'episode'")
    assert [trial.state == COMPLETE for trial in study.trials] == [False, True]
