import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnv, IdentityEnvBox, IdentityEnvMultiBinary, IdentityEnvMultiDiscrete
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_reinforce import REINFORCE


@pytest.mark.slow
@pytest.mark.parametrize(
    "env_class, env_kwargs, baseline",
    [
        (IdentityEnv, dict(dim=2), "timestep"),
        (IdentityEnv, dict(dim=2), "leave_one_out"),
        (IdentityEnv, dict(dim=2), "linear"),
        (IdentityEnvMultiDiscrete, dict(dim=2), "timestep"),
        (IdentityEnvMultiBinary, dict(dim=2), "value"),
        (IdentityEnvBox, dict(eps=0.5), "timestep"),
        (IdentityEnvBox, dict(eps=0.5), "value"),
    ],
)
def test_identity(env_class, env_kwargs, baseline):
    """The task is to repeat the observation: 1 for each of 50 steps where the action does. A random policy gets 12 to 25."""
    env = make_vec_env(lambda: env_class(ep_length=50, **env_kwargs), n_envs=2, seed=0)
    model = REINFORCE("MlpPolicy", env, gamma=0.0, baseline=baseline, seed=0)
    random_score, _ = evaluate_policy(model, env, n_eval_episodes=10, deterministic=False)
    model.learn(10_000)
    score, _ = evaluate_policy(model, env, n_eval_episodes=10)
    assert random_score < 35 and score > 45


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The baseline predicts the returns worse")  # When all returns are nearly the same
def test_rewards_of_the_final_step_only():
    """The whole episode is credited: the number of right actions is the reward of the last step."""

    class Delayed(IdentityEnv):
        def step(self, action):
            obs, reward, terminated, truncated, info = super().step(action)
            self.total = reward + (self.total if self.current_step > 1 else 0.0)
            return obs, self.total if truncated else 0.0, terminated, truncated, info

    env = make_vec_env(lambda: Delayed(dim=2, ep_length=5), n_envs=2, seed=0)
    model = REINFORCE("MlpPolicy", env, n_episodes=32, gamma=1.0, time_limit="terminal", seed=0)
    model.learn(15_000)
    scores, _ = evaluate_policy(model, env, n_eval_episodes=20, return_episode_rewards=True)
    assert np.mean(scores) > 4.8
