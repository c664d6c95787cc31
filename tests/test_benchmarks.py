import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import yaml
from stable_baselines3.common.env_checker import check_env

from benchmarks import tasks, tutorial
from benchmarks.plots import running_mean
from sb3_reinforce import REINFORCE
from sb3_reinforce.compare.archive import read_archive
from sb3_reinforce.compare.files import make_jobs, read_json
from sb3_reinforce.compare.report import report
from sb3_reinforce.compare.results import read_runs

ROOT = Path(__file__).parent.parent

#: Bytes that the files of a checkout may have together
MAX_SIZE = 13_000_000


def test_running_mean():
    np.testing.assert_allclose(running_mean(np.array([1.0, 2.0, 6.0, 4.0]), window=2), [1.5, 4.0, 5.0])
    assert len(running_mean(np.ones(3), window=4)) == 0


@pytest.mark.slow
def test_train(tmp_path):
    """What `make train` runs, with a tiny budget."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.train", "-n", "500", "-f", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    folder = tmp_path / "InvertedPendulum-v4_1"
    assert "Mean return over 20 deterministic episodes: " in run.stdout
    for path in (folder / "InvertedPendulum-v4.zip", folder / "learning_curve.png"):
        assert str(path) in run.stdout and path.stat().st_size > 0
    assert len(list(folder.glob("REINFORCE_1/events.out.tfevents.*"))) == 1
    assert REINFORCE.load(folder / "InvertedPendulum-v4.zip").num_timesteps >= 500


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("benchmarks/[a-z]*.py")))
def test_scripts_can_be_imported(name):
    import_module(f"benchmarks.{name}")


def test_checkout_is_small():
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    listed = subprocess.run([git, "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    sizes = {name: (ROOT / name).lstat().st_size for name in listed.split("\0") if name and (ROOT / name).exists()}
    assert sum(sizes.values()) < MAX_SIZE, sorted(sizes.items(), key=lambda item: item[1])[-5:]
    assert not [name for name in sizes if "/runs/" in name]


def test_kept_episodes_are_those_of_the_kept_reports():
    comparisons = sorted(ROOT.glob("benchmarks/**/comparison.json"))
    assert len(comparisons) >= 5
    for out in (path.parent for path in comparisons):
        comparison = read_json(out / "comparison.json")
        jobs = make_jobs(out, comparison)
        runs = read_runs(out, comparison, jobs, read_archive(out))
        assert runs.to_csv(index=False, float_format="%.7g") == (out / "runs.csv").read_text()
        found = read_json(out / "results.json")["statistics"]
        assert report(comparison, runs, found, comparison["versions"]) == (out / "report.md").read_text()


def test_report_of_the_tutorial():
    out = tutorial.OUT
    *table, versions = (out / "report.md").read_text().splitlines()
    episodes = pd.read_csv(out / "episodes.csv.xz")
    assert tutorial.report(episodes, table[3]).splitlines()[:-1] == table and "torch" in versions
    assert (episodes.groupby(["row", "seed"]).size() == tutorial.N_EPISODES).sum() == 20


TASKS = ["Bandit-v0", "Parity-v0", "Corridor-v0", "Salesman-v0", "TMaze-v0", "MaskedTMaze-v0", "FlatBlackjack-v1"]


def play(env, actions):
    """Return the rewards of some actions, and how the last one ended the episode."""
    rewards = []
    for action in actions:
        _, reward, terminated, _, _ = env.step(action)
        rewards.append(reward)
    return rewards, terminated


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.filterwarnings("ignore:.*(render|not within the observation space|symmetric|sparse|2-dimensional)")
def test_task_is_an_environment(env_id):
    check_env(gym.make(env_id), skip_render_check=True)


@pytest.mark.parametrize("seed", range(5))
def test_t_mazes(seed):
    env = gym.make("TMaze-v0")
    observation, _ = env.reset(seed=seed)
    right = 1 + int(observation[1])
    assert observation.tolist() in ([1, 0, 0], [0, 1, 0])
    assert play(env, [1, *[0] * 20, 0]) == ([-0.1, *[0.0] * 20, -0.1], False)
    assert env.unwrapped._observation().tolist() == [0, 0, 1]
    assert play(env, [right]) == ([4.0], True)
    env.reset(seed=seed)
    assert play(env, [*[0] * 20, 3 - right]) == ([*[0.0] * 20, -0.1], True)

    env = gym.make("MaskedTMaze-v0")
    observation, _ = env.reset(seed=seed)
    assert env.get_wrapper_attr("action_masks")().tolist() == [True] + [False] * 7
    play(env, [0] * 20)
    doors = np.flatnonzero(env.get_wrapper_attr("action_masks")())
    assert len(doors) == 2 and 0 not in doors
    assert play(env, [doors[int(observation[1])]]) == ([4.0], True)


def test_bandit():
    env = tasks.Bandit()
    assert env.means.argmax() == 6
    env.reset(seed=0)
    rewards = [env.step(2)[1] for _ in range(10_000)]
    assert np.mean(rewards) == pytest.approx(env.means[2], abs=0.04)  # Four standard errors
    assert np.std(rewards) == pytest.approx(1.0, abs=0.03)


def test_parity():
    env = tasks.Parity()
    seen = set()
    for seed in range(20):
        observation, _ = env.reset(seed=seed)
        right = int(observation[0] ^ observation[1])
        seen.add(tuple(observation))
        assert play(env, [right, right]) == ([0.0, 1.0], True)
        env.reset(seed=seed)
        assert play(env, [right, 1 - right]) == ([0.0, 0.0], True)
        env.reset(seed=seed)
        assert play(env, [1 - right, right]) == ([0.0, 0.0], True)
    assert len(seen) == 4


def test_corridor():
    """Right, then left, as the second state has its actions reversed, then right."""
    env = tasks.Corridor()
    env.reset()
    assert play(env, [1, 0, 1]) == ([-1.0] * 3, True)
    env.reset()
    assert play(env, [0, 0, 1, 1, 1, 0, 1]) == ([-1.0] * 7, True)
    env.reset()
    assert play(env, [1] * 50) == ([-1.0] * 50, False)


def test_salesman():
    env = tasks.Salesman()
    assert env.shortest() == pytest.approx(3.151, abs=1e-3)
    env.reset()
    rewards, terminated = play(env, [3, 1, 5, 2, 4])
    assert terminated and rewards == [0.0] * 4 + [-env.length([0, 3, 1, 5, 2, 4])]
    env.reset()
    assert play(env, [3, 1, 3]) == ([0.0, 0.0, -10.0], True)
    env.reset()
    assert play(env, [0]) == ([-10.0], True)


def test_random_maze():
    """The goal can be reached, walls stop, the observation shows them, and a seed gives its maze again."""
    env, lengths = tasks.RandomMaze(), []
    for seed in range(50):
        first, _ = env.reset(seed=seed)
        assert first.shape == (27,) and env.observation_space.contains(first)
        walls, start, goal = env.is_wall.copy(), tuple(env.place), tuple(env.goal)
        assert not walls[start[0] + 2, start[1] + 2] and first[12] == 0 and start != goal
        assert first[25:] == pytest.approx(np.subtract(goal, start) / env.size)
        # The nearest cells first: how long is the shortest way
        distance, border = {start: 0}, [start]
        for cell in border:
            for move in env.moves:
                near = (cell[0] + move[0], cell[1] + move[1])
                if not walls[near[0] + 2, near[1] + 2] and near not in distance:
                    distance[near] = distance[cell] + 1
                    border.append(near)
        lengths.append(distance[goal])
        for action, seen in enumerate((13, 17, 11, 7)):  # Right, down, left, up
            env.reset(seed=seed)
            assert np.array_equal(env.is_wall, walls)
            _, reward, terminated, _, _ = env.step(action)
            assert reward == -1.0 and (tuple(env.place) == start) == bool(first[seen])
            assert terminated == (tuple(env.place) == goal)
    assert max(lengths) > 7  # From start to start, the returns differ


def test_first_hour_is_the_bare_call():
    entries = yaml.safe_load((ROOT / "benchmarks" / "first_hour.yml").read_text())
    assert {name: keys for name, entry in entries.items() if (keys := entry.keys() - {"policy", "n_timesteps"})} == {
        "Salesman-v0": {"gamma"}
    }
    assert all(env_id in gym.registry for env_id in entries)
