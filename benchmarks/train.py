"""
Train REINFORCE on one environment, evaluate it over 20 episodes, and draw its learning curve.

    python -m benchmarks.train --env InvertedPendulum-v4 --seed 1
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.utils import get_latest_run_id

from benchmarks.plots import plot_learning_curve
from sb3_reinforce import REINFORCE


def main() -> None:
    """Train, evaluate, draw."""
    warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)  # The tutorial's environment is v4
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="InvertedPendulum-v4", help="environment ID")
    parser.add_argument("-n", "--n-timesteps", type=int, default=100_000, help="number of time steps")
    parser.add_argument("--seed", type=int, default=1, help="random generator seed")
    parser.add_argument("-f", "--log-folder", type=Path, default=Path("logs/reinforce"), help="log folder")
    args = parser.parse_args()

    folder = args.log_folder / f"{args.env}_{get_latest_run_id(str(args.log_folder), args.env) + 1}"
    env = make_vec_env(args.env, seed=args.seed, monitor_dir=str(folder))
    model = REINFORCE("MlpPolicy", env, seed=args.seed, tensorboard_log=str(folder))
    model.learn(args.n_timesteps, progress_bar=True)
    model.save(folder / args.env)
    episodes = load_results(str(folder))
    returns, steps = episodes["r"].to_numpy(), episodes["l"].to_numpy().cumsum()
    picture = folder / "learning_curve.png"
    plot_learning_curve(steps, returns, picture, f"{args.env}, seed {args.seed}")

    eval_env = make_vec_env(args.env, seed=args.seed + 1000)
    scores, _ = evaluate_policy(model, eval_env, n_eval_episodes=20, deterministic=True, return_episode_rewards=True)
    print(f"Mean return over 20 deterministic episodes: {np.mean(scores):.1f} +/- {np.std(scores, ddof=1):.1f}")
    print(f"Model:          {folder / args.env}.zip")
    print(f"Learning curve: {picture}")
    print(f"TensorBoard:    {os.path.relpath(Path(sys.executable).with_name('tensorboard'))} --logdir {folder}")


if __name__ == "__main__":
    main()
