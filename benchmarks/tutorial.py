"""
The figure of Gymnasium's tutorial "Training using REINFORCE for Mujoco": InvertedPendulum-v4, five seeds, 5000 episodes.

    OMP_NUM_THREADS=1 python -m benchmarks.tutorial --jobs 2

The rows: a program of its own in plain PyTorch, written after the tutorial's description, with the tutorial's loss as
corrected and as published before; ``REINFORCE`` with the settings of both, ``hyperparams/tutorial.yml``; and the default of
``REINFORCE``, which stops after 100,000 steps. A run that is in the file of results is not made again.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import torch as th
import yaml
from joblib import Parallel, delayed
from stable_baselines3.common.callbacks import StopTrainingOnMaxEpisodes
from stable_baselines3.common.monitor import Monitor
from torch import nn
from torch.distributions import Normal
from torch.nn import functional as F

from benchmarks.intervals import mean_interval
from benchmarks.plots import plot_tutorial
from sb3_reinforce import REINFORCE
from sb3_reinforce.checks import versions
from sb3_reinforce.zoo.hyperparams import FOLDER

ENV_ID = "InvertedPendulum-v4"
SEEDS = (1, 2, 3, 5, 8)
N_EPISODES = 5000
N_TIMESTEPS = 100_000
OUT = Path(__file__).parent / "tutorial"


class SameStart(gym.Wrapper):
    """
    Begin every episode with the same seed, as the tutorial does.

    :param env: Environment
    :param seed: The seed
    """

    def __init__(self, env: gym.Env, seed: int):
        super().__init__(env)
        self.seed = seed

    def reset(self, **kwargs):  # type: ignore[no-untyped-def]
        return self.env.reset(seed=self.seed)


class Network(nn.Module):
    """The tutorial's policy: layers of 16 and 32 units that mean and standard deviation share."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 32), nn.Tanh())
        self.mean, self.std = nn.Linear(32, 1), nn.Linear(32, 1)

    def forward(self, observation: th.Tensor) -> Normal:
        latent = self.shared(observation)
        return Normal(self.mean(latent) + 1e-6, F.softplus(self.std(latent)) + 1e-6)


def plain_program(seed: int, corrected: bool, n_episodes: int) -> pd.DataFrame:
    """
    Train as the tutorial does: one episode, one step of AdamW.

    :param seed: Seed
    :param corrected: Whether the loss sums log-probability times reward-to-go, or multiplies the mean log-probability with the
        sum of the rewards-to-go
    :param n_episodes: Number of episodes
    :return: Return, length and seconds since the start of each episode
    """
    th.manual_seed(seed)
    network = Network()
    optimizer = th.optim.AdamW(network.parameters(), lr=1e-4)
    env = SameStart(gym.make(ENV_ID), seed)
    rows, start = [], time.perf_counter()
    for _ in range(n_episodes):
        observation, _ = env.reset()
        log_probs, rewards, is_over = [], [], False
        while not is_over:
            distribution = network(th.as_tensor(observation, dtype=th.float32))
            action = distribution.sample()
            log_probs.append(distribution.log_prob(action).sum())
            observation, reward, terminated, truncated, _ = env.step(action.numpy())
            rewards.append(float(reward))
            is_over = terminated or truncated
        returns, following = [], 0.0
        for reward in reversed(rewards):
            following = reward + 0.99 * following
            returns.append(following)
        to_go, stacked = th.tensor(returns[::-1]), th.stack(log_probs)
        loss = -(stacked * to_go).sum() if corrected else -stacked.mean() * to_go.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rows.append((sum(rewards), len(rewards), time.perf_counter() - start))
    return pd.DataFrame(rows, columns=["return", "length", "seconds"])


def with_reinforce(seed: int, entry: str | None, n_episodes: int) -> pd.DataFrame:
    """
    Train with ``REINFORCE``.

    :param seed: Seed
    :param entry: Entry of ``tutorial.yml``; ``None`` for the default and the budget of steps
    :param n_episodes: Number of episodes
    :return: As :func:`plain_program`
    """
    settings = {} if entry is None else yaml.safe_load((FOLDER / "tutorial.yml").read_text())[entry]
    settings = {key: value for key, value in settings.items() if key not in ("n_timesteps", "policy")}
    if "policy_kwargs" in settings:
        settings["policy_kwargs"] = eval(settings["policy_kwargs"], {"th": th})
    env = gym.make(ENV_ID)
    env = Monitor(env if entry is None else SameStart(env, seed))
    model = REINFORCE("MlpPolicy", env, seed=seed, device="cpu", **settings)
    start = time.time() - env.t_start
    callback = None if entry is None else StopTrainingOnMaxEpisodes(n_episodes)
    model.learn(N_TIMESTEPS if entry is None else 1000 * n_episodes, callback=callback)
    columns = {"return": env.get_episode_rewards(), "length": env.get_episode_lengths(), "seconds": env.get_episode_times()}
    rows = pd.DataFrame(columns)
    return rows.assign(seconds=rows["seconds"] - start)


ROWS: dict[str, Callable[[int, int], pd.DataFrame]] = {
    "plain program, corrected": lambda seed, n: plain_program(seed, True, n),
    "plain program, as published": lambda seed, n: plain_program(seed, False, n),
    "REINFORCE, corrected": lambda seed, n: with_reinforce(seed, ENV_ID, n),
    "REINFORCE, as published": lambda seed, n: with_reinforce(seed, f"{ENV_ID}-as-published", n),
    "REINFORCE, default": lambda seed, n: with_reinforce(seed, None, n),
}


def run(name: str, seed: int, n_episodes: int, out: Path) -> None:
    """
    Train one run, print its mean return every 1000 episodes, and keep its episodes.

    :param name: One of :data:`ROWS`
    :param seed: Seed
    :param n_episodes: Number of episodes
    :param out: Folder to write to
    """
    th.set_num_threads(1)
    episodes = ROWS[name](seed, n_episodes)
    for end in range(1000, len(episodes) + 1, 1000):
        mean = episodes["return"][end - 50 : end].mean()
        print(f"{name}, seed {seed}: Episode: {end} Average Reward: {mean:.0f}", flush=True)
    path = out / "episodes" / f"{name}_{seed}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    episodes.to_csv(path, index=False, float_format="%.6g")


def report(episodes: pd.DataFrame, command: str) -> str:
    """
    Write the report.

    :param episodes: Episodes of all runs
    :param command: What has made them
    :return: The report, in Markdown
    """
    lines = ["# The tutorial's figure", "", "```", command, "```", "", "![returns](returns.png)", ""]
    lines.append(
        "Mean return of the last 1000 episodes of a run (of the last 50 for the default, which stops after 100,000 steps):"
    )
    lines += [
        "",
        "| | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | mean [95 %] | steps of a run | steps per second |",
    ]
    lines.append("|---" * (len(SEEDS) + 4) + "|")
    for name, rows in episodes.groupby("row", sort=False):
        last = 50 if "default" in str(name) else 1000
        means = np.array([rows[rows["seed"] == seed]["return"][-last:].mean() for seed in SEEDS])
        low, high = mean_interval(means)
        steps = rows.groupby("seed")["length"].sum()
        speed = steps / rows.groupby("seed")["seconds"].max()
        cells = [str(name), *(f"{mean:.0f}" for mean in means), f"{means.mean():.0f} [{low:.0f}, {high:.0f}]"]
        lines.append("| " + " | ".join([*cells, f"{steps.median():,.0f}", f"{speed.median():,.0f}"]) + " |")
    seeds = " ".join(map(str, SEEDS))
    lines += ["", f"Seeds {seeds}. Intervals: percentiles of the bootstrap over the seeds. Steps and speed are medians."]
    lines += ["", ", ".join(f"{package} {number}" for package, number in versions().items()) + "."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is missing, write the report, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--n-episodes", type=int, default=N_EPISODES, help="number of episodes of a run")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to")
    args = parser.parse_args()
    runs = [(name, seed) for name in ROWS for seed in SEEDS]
    paths = {(name, seed): args.out / "episodes" / f"{name}_{seed}.csv" for name, seed in runs}
    archive = args.out / "episodes.csv.xz"
    kept = pd.read_csv(archive) if archive.is_file() else pd.DataFrame(columns=["row", "seed"])
    done = set(zip(kept["row"], kept["seed"], strict=True))
    missing = [run for run in runs if run not in done and not paths[run].is_file()]
    Parallel(n_jobs=args.jobs, batch_size=1)(delayed(run)(name, seed, args.n_episodes, args.out) for name, seed in missing)
    parts = [
        kept[(kept["row"] == name) & (kept["seed"] == seed)]
        if (name, seed) in done
        else pd.read_csv(paths[name, seed]).assign(row=name, seed=seed)
        for name, seed in runs
    ]
    episodes = pd.concat(parts, ignore_index=True)
    episodes.to_csv(archive, index=False)
    (args.out / "report.md").write_text(report(episodes, "OMP_NUM_THREADS=1 python -m benchmarks.tutorial --jobs 2"))
    plot_tutorial(episodes, args.out / "returns.png")


if __name__ == "__main__":
    main()
