"""
Environment steps until InvertedPendulum-v4 is solved (the last 20 training episodes average 950), and the score of the
final policy over 100 deterministic episodes: REINFORCE and SB3's PPO, both with the defaults of their constructors.

    python -m benchmarks.steps_to_solve --seeds 0 1 2 3 4 5 6 7 8 9 --jobs 2
"""

import argparse
import json
import platform
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from benchmarks.plots import WINDOW, plot_learning_curves, running_mean
from sb3_reinforce import REINFORCE

ENV = "InvertedPendulum-v4"
N_TIMESTEPS = 100_000
THRESHOLD = 950
N_EVAL_EPISODES = 100
ALGORITHMS = {"REINFORCE": REINFORCE, "PPO": PPO}
FOLDER = Path(__file__).parent / "results" / "steps_to_solve"
PACKAGES = ["sb3-reinforce", "stable-baselines3", "torch", "gymnasium", "mujoco", "numpy"]


def run(job: tuple[str, int]) -> dict:
    """
    :param job: Algorithm and seed
    :return: What came out of the run
    """
    name, seed = job
    th.set_num_threads(1)
    model = ALGORITHMS[name]("MlpPolicy", ENV, seed=seed, device="cpu")
    model.learn(N_TIMESTEPS)
    env = model.get_env()
    returns, lengths = (np.array(env.env_method(f"get_episode_{what}")[0]) for what in ("rewards", "lengths"))
    steps, means = lengths.cumsum(), running_mean(returns)
    solved = np.flatnonzero(means >= THRESHOLD)
    # Seeds of evaluation are not those of any training run
    eval_env = make_vec_env(ENV, n_envs=10, seed=1000 * (seed + 1))
    final = {}
    for kind, deterministic in (("deterministic", True), ("stochastic", False)):
        scores, _ = evaluate_policy(model, eval_env, N_EVAL_EPISODES, deterministic, return_episode_rewards=True)
        final[kind] = float(np.mean(scores))
    result = {
        "algorithm": name,
        "seed": seed,
        "steps_to_solve": int(steps[solved[0] + WINDOW - 1]) if len(solved) else None,
        "final_score": final,
        "episode_ends": steps.tolist(),
        "episode_returns": returns.tolist(),
    }
    print({key: value for key, value in result.items() if not key.startswith("episode")}, flush=True)
    return result


def report(results: list[dict], seeds: list[int]) -> str:
    """
    :param results: One entry per run
    :param seeds: The seeds
    :return: Table in Markdown
    """
    lines = [
        f"{ENV}, {N_TIMESTEPS:,} steps, 1 environment, defaults of the constructors, seeds {' '.join(map(str, seeds))}.",
        f"Steps to solve: until the last {WINDOW} training episodes average {THRESHOLD}; medians count a run that never got",
        f"there as slower than any other. Final score: mean over {N_EVAL_EPISODES} episodes of the policy at the end of",
        "training (not the best one), then mean and range over the seeds.",
        "",
        "| | solved | steps to solve: median (range) | final score, deterministic | final score, stochastic |",
        "|---|---|---|---|---|",
    ]
    for name in ALGORITHMS:
        runs = [r for r in results if r["algorithm"] == name]
        steps = [r["steps_to_solve"] or np.inf for r in runs]
        scores = [[r["final_score"][kind] for r in runs] for kind in ("deterministic", "stochastic")]
        cells = [f"{np.mean(s):.0f} ({min(s):.0f} to {max(s):.0f})" for s in scores]
        lines.append(
            f"| {name} | {np.isfinite(steps).sum()} of {len(runs)} | {np.median(steps):,.0f} ({min(steps):,.0f} to "
            f"{max(steps):,.0f}) | {cells[0]} | {cells[1]} |"
        )
    lines += ["", "| seed | " + " | ".join(f"{name}: steps to solve | final score" for name in ALGORITHMS) + " |"]
    lines.append("|---|" + "---|---|" * len(ALGORITHMS))
    for seed in seeds:
        runs = [next(r for r in results if (r["algorithm"], r["seed"]) == (name, seed)) for name in ALGORITHMS]
        cells = [f"{r['steps_to_solve'] or 'not solved'} | {r['final_score']['deterministic']:.0f}" for r in runs]
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
    versions = [f"{package} {version(package)}" for package in PACKAGES]
    lines += ["", f"Python {platform.python_version()}, {', '.join(versions)}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)), help="random generator seeds")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()

    with get_context("spawn").Pool(args.jobs) as pool:
        results = pool.map(run, [(name, seed) for seed in args.seeds for name in ALGORITHMS], chunksize=1)
    FOLDER.parent.mkdir(exist_ok=True)
    FOLDER.with_suffix(".json").write_text(json.dumps(results))
    FOLDER.with_suffix(".md").write_text(report(results, args.seeds))
    curves = {
        name: [(np.array(r["episode_ends"]), np.array(r["episode_returns"])) for r in results if r["algorithm"] == name]
        for name in ALGORITHMS
    }
    plot_learning_curves(curves, FOLDER.with_suffix(".png"), f"{ENV}, default settings")


if __name__ == "__main__":
    main()
