"""
Learn from a reward that a function gives to whole episodes: keep the pole up, and the cart in the middle.

    python -m examples.whole_episodes --steps 50000
"""

import argparse
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_reinforce import REINFORCE
from sb3_reinforce.episode_reward import EpisodeReward, EpisodeRewardWrapper

ENV_ID = "CartPole-v1"
#: Steps of the longest episode, and where the track ends
LONGEST, EDGE = 500, 2.4


def judge(episode: Any) -> float:
    """
    Judge an episode.

    :param episode: An episode, see "Your own reward" in the documentation
    :return: The share of the time that the pole has stayed up, times how near the cart was to the middle on average, in [0, 1]
    """
    return len(episode) / LONGEST * (1 - float(np.abs(episode.observations[:, 0]).mean()) / EDGE)


def main() -> None:
    """Train with the judge, evaluate by it on the way, and tell what the environment would have paid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50_000, help="number of time steps")
    parser.add_argument("--seed", type=int, default=0, help="random generator seed")
    args = parser.parse_args()
    env = make_vec_env(ENV_ID, seed=args.seed + 1)
    judged_env = make_vec_env(ENV_ID, 1, args.seed + 2, wrapper_class=EpisodeRewardWrapper, wrapper_kwargs={"function": judge})
    evaluation = EvalCallback(judged_env, eval_freq=max(1, args.steps // 10), n_eval_episodes=20)
    # The judgement is the whole reward: nothing is discounted, nothing comes after a time limit, and no step is judged by the
    # critic instead
    model = REINFORCE("MlpPolicy", ENV_ID, gamma=1.0, gae_lambda=1.0, time_limit="terminal", seed=args.seed)
    model.learn(args.steps, callback=[EpisodeReward(judge), evaluation])
    print(f"The judge: {evaluate_policy(model, judged_env, 20)[0]:.2f}")
    print(f"The environment: {evaluate_policy(model, env, 20)[0]:.1f}")


if __name__ == "__main__":
    main()
