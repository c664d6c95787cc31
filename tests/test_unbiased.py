"""
The mean of many gradient estimates against the gradient by enumeration.

Each check is a chi-square test of ``n_updates`` estimates at one fixed policy, with three degrees of freedom (the logit
difference of each state). Right code fails the test with probability 1e-4 (the seed is fixed, so that the result is always
the same). Two wrong estimators that the test must reject show its power: the batch mean without its factor 1 - 1/N, which
is off by a quarter of the gradient, and a batch of the first N episodes to finish.
"""

from itertools import product

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from scipy import stats
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_reinforce import REINFORCE
from sb3_reinforce.baselines import BASELINES
from sb3_reinforce.returns import RETURNS, timesteps
from tests.helpers import PLAIN, store_batch

#: Baselines are also tried with returns that they are not made for, and with few episodes, and steps have no length
pytestmark = [
    pytest.mark.filterwarnings("ignore:baseline=.* estimates the reward-to-go"),
    pytest.mark.filterwarnings("ignore:The baseline predicts the returns worse"),
    pytest.mark.filterwarnings("ignore:No step has been made"),
]

N_STATES = 3
GAMMA = 0.8


class SmallMDP(gym.Env):
    """
    Three states, two actions, and episodes that end at the horizon at the latest.

    Action 0 ends the episode (with reward 1 + state); action 1 goes on to one of the next two states with equal probability
    (reward 0.5 - state).
    """

    observation_space = spaces.Box(0, 1, (N_STATES,))
    action_space = spaces.Discrete(2)

    def __init__(self, horizon):
        self.horizon = horizon

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.time = 0
        return self._observation(), {}

    def step(self, action):
        reward = self.reward(self.state, action)
        self.time += 1
        self.state = (self.state + int(self.np_random.integers(1, 3))) % N_STATES
        return self._observation(), reward, bool(action == 0 or self.time == self.horizon), False, {}

    def _observation(self):
        return np.eye(N_STATES, dtype=np.float32)[self.state]

    @staticmethod
    def reward(state, action):
        return 1.0 + state if action == 0 else 0.5 - state

    @classmethod
    def episodes(cls, horizon, start=0):
        """Yield all episodes as (states, actions, probability of the transitions)."""
        for length in range(1, horizon + 1):
            for moves in product((1, 2), repeat=length - 1):
                states = np.cumsum([start, *moves]) % N_STATES
                for last in (0, 1) if length == horizon else (0,):
                    yield states, [1] * (length - 1) + [last], 0.5 ** (length - 1)


class RandomStart(SmallMDP):
    """The seed of the reset decides the start, and the later transitions."""

    #: How large the rewards of an episode are, by its start
    scales = (1.0, 1.0, 1.0)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(N_STATES))
        self.scale = self.scales[self.state]
        return self._observation(), {}

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, self.scale * reward, *rest


class UnlikeStarts(RandomStart):
    scales = (0.1, 1.0, 10.0)


def enumerate_gradient(model, horizon, estimate, start=0):
    """Return the expectation over all episodes of the gradient of ``estimate(log_probs, rewards)``."""
    log_pi = model.policy.get_distribution(th.eye(N_STATES)).distribution.logits.double()
    total = 0.0
    for states, actions, probability in SmallMDP.episodes(horizon, start):
        log_probs = log_pi[states, actions]
        rewards = np.array([SmallMDP.reward(s, a) for s, a in zip(states, actions, strict=True)])
        total = total + probability * log_probs.sum().exp().detach() * estimate(log_probs, rewards)
    return logit_gradient(th.autograd.grad(total, model.policy.action_net.weight)[0])


def logit_gradient(weight_gradient):
    return (weight_gradient[1] - weight_gradient[0]).double().numpy()


def score_times_return(model):
    def estimate(log_probs, rewards):
        lengths = np.array([len(rewards)])
        weights = RETURNS[model.returns](rewards, lengths, model.gamma)
        if model.discount_states:
            weights = weights * model.gamma ** timesteps(lengths)
        return (log_probs * th.as_tensor(weights)).sum()

    return estimate


class FirstToFinish(REINFORCE):
    """A wrong rule for the batch, which this package does not use: the first N episodes to finish."""

    def collect_rollouts(self, env, callback, rollout_buffer, n_rollout_steps):
        callback.on_rollout_start()
        rollout_buffer.reset()
        obs, unfinished, finished = env.reset(), [[] for _ in range(env.num_envs)], []
        while len(finished) < self.n_episodes:
            actions, _ = self.predict(obs)
            new_obs, rewards, dones, _ = env.step(actions)
            for i, steps in enumerate(unfinished):
                steps.append((obs[i], actions[i], rewards[i]))
                if dones[i]:
                    finished.append(steps)
                    unfinished[i] = []
            obs = new_obs
        store_batch(rollout_buffer, [map(np.array, zip(*steps, strict=True)) for steps in finished[: self.n_episodes]])
        self.num_timesteps += 1  # One rollout per time step: the total counts the updates
        return True


class Estimates(BaseCallback):
    """Keep the gradient of every update, and stop after enough of them."""

    def __init__(self, n_updates):
        super().__init__()
        self.n_updates = n_updates
        self.estimates = []

    def _on_training_start(self):
        self.gradients, weight = [], self.model.policy.action_net.weight
        self.model.policy.optimizer.register_step_pre_hook(lambda *_: self.gradients.append(weight.grad.clone()))
        self.is_first = True

    def _on_rollout_start(self):
        if not self.is_first:  # Where all returns are equal, the gradient is zero and no step is made
            self.estimates.append(-logit_gradient(self.gradients.pop()) if self.gradients else np.zeros(N_STATES))
        self.is_first = False

    def _on_step(self):
        return len(self.estimates) < self.n_updates


def make_model(horizons, cls=REINFORCE, n_episodes=4, env_class=SmallMDP, **kwargs):
    env = DummyVecEnv([lambda horizon=horizon: env_class(horizon) for horizon in horizons])
    settings = {**PLAIN, "gamma": 1.0, "normalize_advantage": False, "target_kl": None, "n_episodes": n_episodes, "seed": 0}
    settings.update(policy_kwargs=dict(net_arch=dict(pi=[], vf=[]), ortho_init=False), **kwargs)
    model = cls("MlpPolicy", env, learning_rate=0.0, **settings)
    with th.no_grad():
        model.policy.action_net.weight.copy_(th.tensor([[0.0, 0.5, -0.3], [0.8, 0.0, 0.2]]))
    return model


def p_value(model, expected, n_updates=1000, up_to_a_factor=False):
    callback = Estimates(n_updates)
    model.learn(n_updates + 1 if isinstance(model, FirstToFinish) else 10**7, callback=callback, log_interval=None)
    estimates = np.array(callback.estimates)
    assert estimates.shape == (n_updates, N_STATES)
    mean, precision = estimates.mean(axis=0), np.linalg.inv(np.cov(estimates.T) / n_updates)
    if up_to_a_factor:
        expected = expected * (mean @ precision @ expected) / (expected @ precision @ expected)
    error = mean - expected
    return stats.chi2.sf(error @ precision @ error, df=N_STATES - up_to_a_factor)


def expected_gradient(model, horizons):
    """Every environment gives the same number of episodes."""
    return np.mean([enumerate_gradient(model, horizon, score_times_return(model)) for horizon in horizons], axis=0)


@pytest.mark.parametrize("horizon", [1, 4])
@pytest.mark.parametrize("settings", [dict(returns="episode"), dict(discount_states=True)])
def test_expectation_is_the_gradient_of_the_objective(horizon, settings):
    """The estimator's expectation, by enumeration, against automatic differentiation of the objective (gamma < 1)."""
    model = make_model([horizon], gamma=GAMMA, baseline=None, **settings)

    def objective(log_probs, rewards):
        """Its gradient at the current policy is that of probability times discounted return."""
        return log_probs.sum() * float(sum(GAMMA**k * r for k, r in enumerate(rewards)))

    np.testing.assert_allclose(
        enumerate_gradient(model, horizon, score_times_return(model)), enumerate_gradient(model, horizon, objective), rtol=1e-5
    )


def test_enumeration_is_complete():
    model = make_model([4])
    log_pi = model.policy.get_distribution(th.eye(N_STATES)).distribution.logits.double()
    probabilities = [p * log_pi[s, a].sum().exp().item() for s, a, p in SmallMDP.episodes(4)]
    assert sum(probabilities) == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "baseline, horizons, sampler",
    [
        *((baseline, [2, 2, 3, 5], "numpy") for baseline in (None, *BASELINES, "value")),
        *(("timestep", horizons, sampler) for horizons, sampler in (([4], "numpy"), ([1, 4], "numpy"), ([1, 4], "pytorch"))),
    ],
    indirect=["sampler"],
)
def test_unbiased(baseline, horizons, sampler):
    model = make_model(horizons, baseline=baseline)
    factor = 1 - 1 / 4 if baseline == "mean" else 1.0
    assert p_value(model, factor * expected_gradient(model, horizons)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        dict(returns="episode", baseline="leave_one_out"),
        dict(returns="mean_reward_to_go", baseline="leave_one_out"),
        dict(discount_states=True),
        dict(returns="episode", baseline="mean"),
    ],
)
def test_unbiased_discounted(settings):
    model = make_model([2, 4], gamma=GAMMA, **settings)
    factor = 1 - 1 / 4 if model.baseline == "mean" else 1.0
    assert p_value(model, factor * expected_gradient(model, [2, 4])) > 1e-4


@pytest.mark.slow
def test_mean_without_its_factor_is_rejected():
    model = make_model([4], baseline="mean")
    assert p_value(model, expected_gradient(model, [4])) < 1e-8


@pytest.mark.slow
def test_first_to_finish_is_rejected():
    """Same environments, same policy, same test: only the rule for the batch differs."""
    horizons = [5, 5, 5, 5]
    model = make_model(horizons, baseline="leave_one_out")
    assert p_value(model, expected_gradient(model, horizons)) > 1e-4
    model = make_model(horizons, FirstToFinish, baseline="leave_one_out")
    assert p_value(model, expected_gradient(model, horizons)) < 1e-8


# Groups of episodes that share a start


class NormalizedPerStart(REINFORCE):
    """A wrong rule, which this package does not have: advantages in units of the standard deviation of their group."""

    def _estimate_advantages(self, critic, chunks):
        metrics = super()._estimate_advantages(critic, chunks)
        buffer = self.rollout_buffer
        groups = np.repeat(buffer.groups, buffer.lengths)
        for group in range(buffer.n_groups):
            buffer.advantages[groups == group] /= buffer.advantages[groups == group].std() + 1e-3
        return metrics


def p_value_of_groups(horizons, env_class=RandomStart, up_to_a_factor=False, **settings):
    model = make_model(horizons, n_episodes=8, env_class=env_class, **settings)
    expected = np.mean(
        [
            scale * enumerate_gradient(model, horizon, score_times_return(model), start)
            for horizon in horizons
            for start, scale in enumerate(env_class.scales)
        ],
        axis=0,
    )
    factor = 1 - 1 / model.group_size if model.baseline == "mean" else 1.0
    return p_value(model, factor * expected, up_to_a_factor=up_to_a_factor)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:group_size=.* has no use for baseline")
@pytest.mark.parametrize(
    "baseline, group_size, horizons",
    [
        *(
            (baseline, group_size, horizons)
            for baseline in (None, *BASELINES, "greedy", "value")
            for group_size, horizons in ((4, [3, 3]), (2, [4]))
        ),
        ("timestep", 2, [3, 3, 3]),
        ("greedy", 1, [4, 4]),
    ],
)
def test_groups_are_unbiased(baseline, group_size, horizons):
    """Although its episodes share the seed of the environment's noise."""
    assert p_value_of_groups(horizons, baseline=baseline, group_size=group_size) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("cls, is_right", [(REINFORCE, True), (NormalizedPerStart, False)])
def test_normalization_per_start_is_rejected(cls, is_right):
    """It gives starts of unlike rewards the same weight: not even the direction of the gradient is right."""
    settings = dict(baseline="leave_one_out", group_size=4, env_class=UnlikeStarts, up_to_a_factor=True)
    p = p_value_of_groups([3, 3], cls=cls, **settings)
    assert p > 1e-4 if is_right else p < 1e-8
