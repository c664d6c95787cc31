"""
The batch, the advantages and the gradient against an implementation that is slow and obvious, on random environments.

``make fuzz`` tries more cases than ``make test``.
"""

import os
from copy import copy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import DummyVecEnv

from tests.envs import RecordVec, some_masks
from tests.helpers import (
    batch_of,
    clone,
    collect,
    critic_names,
    gradient_of,
    linear_predictions,
    make_model,
    obs_of_step,
    step_by_step,
)

#: Baselines are also tried with returns that they are not made for
pytestmark = pytest.mark.filterwarnings("ignore:baseline=.* estimates the reward-to-go")

N_CASES = int(os.environ.get("FUZZ_CASES", 120))

#: Steps of the longest episodes
MAX_LENGTH = 200 if "FUZZ_CASES" in os.environ else 40

OBSERVATIONS = {
    "box": spaces.Box(-10, 10, (3,)),
    "discrete": spaces.Discrete(4),
    "multi-discrete": spaces.MultiDiscrete([2, 3]),
    "multi-binary": spaces.MultiBinary(3),
    "dict": spaces.Dict(vector=spaces.Box(-1, 1, (2,)), cell=spaces.Discrete(3)),
}
ACTIONS = {
    "box": spaces.Box(-0.5, 0.5, (2,)),
    "discrete": spaces.Discrete(3),
    "multi-discrete": spaces.MultiDiscrete([2, 3]),
    "multi-binary": spaces.MultiBinary(2),
}


class ScriptedEnv(gym.Env):
    """
    Episodes of given lengths and ends, over and over, with random observations and rewards.

    :param ends: Length of each episode, and whether a time limit ends it
    :param scale: Rewards are whole numbers from -3 to 3 times this
    :param masked: Whether to offer random action masks
    """

    def __init__(self, observation_space, action_space, ends, scale, seed, masked):
        self.observation_space, self.action_space = observation_space, action_space
        self.ends, self.scale, self.rng = ends, scale, np.random.default_rng(seed)
        self.observation_space.seed(seed)
        self.episode = -1
        self.time = 0
        if masked:
            self.masks = some_masks(action_space, 50, seed)
            self.action_masks = lambda: self.masks[(7 * self.episode + self.time) % 50]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:  # Episodes that share it have the same observations
            self.observation_space.seed(seed)
        self.episode += 1
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        length, is_truncated = self.ends[self.episode % len(self.ends)]
        self.time += 1
        over = self.time == length
        reward = float(self.rng.integers(-3, 4)) * self.scale
        return self.observation_space.sample(), reward, over and not is_truncated, over and is_truncated, {}


BASELINES = (None, "mean", "leave_one_out", "timestep", "linear", "greedy", "value")


@st.composite
def cases(draw, baseline):
    """Draw the environments and the settings of a case with the given baseline."""
    n_envs = draw(st.integers(1, 9))
    of_groups = baseline in ("mean", "leave_one_out", "timestep", "greedy")
    group_size = draw(st.sampled_from([1, 1, 2, 3] if of_groups else [1]))
    is_shared = group_size > 1 or baseline == "greedy"
    ends = st.lists(st.tuples(st.integers(1, MAX_LENGTH), st.booleans()), min_size=1, max_size=4)
    returns = draw(st.sampled_from(["reward_to_go", "episode", "mean_reward_to_go"]))
    time_limits = [None, "terminal"] + ["discard"] * (not is_shared) + (["bootstrap"] if baseline == "value" else [])
    is_gae = baseline == "value" and returns == "reward_to_go"
    return dict(
        ends=[draw(ends) for _ in range(n_envs)],
        scale=draw(st.sampled_from([0.0, 1e-3, 1.0, 1e10])),
        seed=draw(st.integers(0, 2**31 - 1)),
        observation=draw(st.sampled_from(list(OBSERVATIONS))),
        action=draw(st.sampled_from(list(ACTIONS))),
        n_episodes=-(-draw(st.integers(max(n_envs, 2), n_envs + 8)) // group_size) * group_size,
        group_size=group_size,
        gamma=draw(st.sampled_from([0.0, 0.5, 0.99, 1.0])),
        gae_lambda=draw(st.sampled_from([None, 0.0, 0.9, 1.0] if is_gae else [None, 1.0])),
        returns=returns,
        baseline=baseline,
        reduction=draw(st.sampled_from(["episode", "step"])),
        discount_states=draw(st.booleans()),
        normalize_advantage=draw(st.booleans()),
        time_limit=draw(st.sampled_from(time_limits)),
        ent_coef=draw(st.sampled_from([0.0, 0.1])),
        memory=draw(st.sampled_from([None, None, "LSTM", "GRU"])),
        masked=draw(st.booleans()),
    )


def resolved(case):
    """Return the case with what None stands for."""
    is_value = case["baseline"] == "value"
    gae_lambda = 0.97 if is_value and case["returns"] == "reward_to_go" else 1.0
    time_limit = "bootstrap" if is_value and case["gamma"] < 1 else "terminal"
    return {
        **case,
        "gae_lambda": gae_lambda if case["gae_lambda"] is None else case["gae_lambda"],
        "time_limit": time_limit if case["time_limit"] is None else case["time_limit"],
    }


def pick(array, step, env_idx):
    """Return the observation of one environment in one step."""
    row = array[step]
    return {key: value[env_idx] for key, value in row.items()} if isinstance(row, dict) else row[env_idx]


def tensors_of(observations):
    """Make one batch of observations."""
    if isinstance(observations[0], dict):
        observations = {key: np.stack([observation[key] for observation in observations]) for key in observations[0]}
    else:
        observations = np.stack(observations)
    return obs_as_tensor(observations, "cpu")


def values_of(model, observations, case):
    """Return what the critic says about the observations of an episode, in the unit of the returns before its first fit."""
    with th.no_grad():
        if case["memory"]:
            values = step_by_step(model.policy, tensors_of(observations))[1].double()
        else:
            values = model.policy.predict_values(tensors_of(observations)).flatten().double()
    return (values * np.sqrt(1 + 1e-8) if model.normalize_value else values).tolist()


def reference_episodes(env, case):
    """
    Find the episodes of the batch in the record of all steps: the quota of each environment.

    :return: Environment, first step and end of each; the group of each; likewise the greedy episodes, by their groups
    """
    n_envs, is_greedy = env.num_envs, case["baseline"] == "greedy"
    played = case["group_size"] + is_greedy
    episodes, rounds, n_steps = [], [], 0
    for i in range(n_envs):
        step = 0
        for turn in range((case["n_episodes"] // case["group_size"] * played + i) // n_envs):
            first = step
            while not env.dones[step][i]:
                step += 1
            step += 1
            episodes.append((i, first, step))
            rounds.append((turn, i))
        n_steps = max(n_steps, step)
    assert n_steps == len(env.dones), "Not a step more is made than is needed"
    # Groups go by the order in which episodes begin
    numbers = [sorted(rounds).index(each) for each in rounds]
    groups = [number // played if played > 1 else 0 for number in numbers]
    greedy = {}
    if is_greedy:
        first_ones = [number % played == 0 for number in numbers]
        greedy = {group: episode for group, episode, one in zip(groups, episodes, first_ones, strict=True) if one}
        groups, episodes = ([x for x, one in zip(each, first_ones, strict=True) if not one] for each in (groups, episodes))
    if case["time_limit"] == "discard":
        episodes = [(i, first, end) for i, first, end in episodes if not env.infos[end - 1][i]["TimeLimit.truncated"]]
        groups = [0] * len(episodes)
    return episodes, groups, greedy


def numbers_of(observation, space):
    """Return what the network gets for an observation: one-hot what is one of several."""
    if isinstance(space, spaces.Dict):
        return np.concatenate([numbers_of(observation[key], part) for key, part in space.spaces.items()])
    if isinstance(space, spaces.Discrete):
        return np.eye(space.n)[int(observation)]
    if isinstance(space, spaces.MultiDiscrete):
        return np.concatenate([np.eye(n)[i] for i, n in zip(observation, space.nvec, strict=True)])
    return np.asarray(observation, dtype=np.float64)


def reference_linear(env, episodes, returns):
    """Return the linear baseline of each step, for each episode."""
    features = []
    for i, first, end in episodes:
        rows = []
        for step in range(first, end):
            numbers, t = numbers_of(pick(env.observations, step, i), env.observation_space), (step - first) / 100
            rows.append([1.0, *numbers, *(number**2 for number in numbers), t, t**2, t**3])
        features.append(np.array(rows))
    return [linear_predictions(features, returns, own) for own in range(len(episodes))]


def returns_of(rewards, last, case):
    """Return the returns of an episode."""
    returns, after = [], last
    for reward in reversed(rewards):
        after = reward + case["gamma"] * after
        returns.insert(0, after)
    if case["returns"] == "episode":
        return [returns[0]] * len(returns)
    if case["returns"] == "mean_reward_to_go":
        return [sum(returns) / len(returns)] * len(returns)
    return returns


def reference_advantages(model, env, episodes, groups, greedy, case):
    """Return the advantages and the returns of all steps, episode by episode."""
    gamma = case["gamma"]
    all_returns, all_values, all_deltas = [], [], []
    for i, first, end in episodes:
        rewards = [float(env.rewards[step][i]) for step in range(first, end)]
        values = [0.0] * len(rewards)
        last = 0.0
        if case["baseline"] == "value":
            info = env.infos[end - 1][i]
            is_cut = case["time_limit"] == "bootstrap" and info["TimeLimit.truncated"]
            shown = [pick(env.observations, step, i) for step in range(first, end)]
            values = values_of(model, shown + [info["terminal_observation"]] * is_cut, case)
            last = values.pop() if is_cut else 0.0
        deltas, after = [], 0.0
        for t in reversed(range(len(rewards))):
            following = values[t + 1] if t + 1 < len(rewards) else last
            after = rewards[t] + gamma * following - values[t] + gamma * case["gae_lambda"] * after
            deltas.insert(0, after)
        all_returns.append(returns_of(rewards, last, case))
        all_values.append(values)
        all_deltas.append(deltas)

    n = len(episodes)
    of_greedy = {
        group: returns_of([float(env.rewards[step][i]) for step in range(first, end)], 0.0, case)
        for group, (i, first, end) in greedy.items()
    }
    linear = reference_linear(env, episodes, all_returns) if case["baseline"] == "linear" else None
    advantages = []
    for e in range(n):
        for t, value in enumerate(all_returns[e]):
            group = [all_returns[o] for o in range(n) if groups[o] == groups[e]]
            others = [all_returns[o] for o in range(n) if groups[o] == groups[e] and o != e]
            own_greedy = of_greedy.get(groups[e], [])
            of_others = [value for r in others for value in r]
            baseline = {
                None: lambda t=t: 0.0,
                "mean": lambda t=t, group=group: sum(r[0] for r in group) / len(group),
                "leave_one_out": lambda t=t, others=others: sum(r[0] for r in others) / len(others),
                "greedy": lambda t=t, own=own_greedy: own[t] if t < len(own) else np.mean(own),
                "timestep": lambda t=t, others=others, rest=of_others: np.mean([r[t] for r in others if t < len(r)] or rest),
                "linear": lambda t=t, e=e: linear[e][t],
                "value": lambda t=t, e=e: all_values[e][t],
            }[case["baseline"]]()
            advantages.append(all_deltas[e][t] if case["gae_lambda"] < 1 else value - baseline)
    largest = max(abs(value) for returns in all_returns for value in returns)
    advantages = np.array(advantages)
    normalize = case["normalize_advantage"] and len(advantages) > 1
    if normalize:
        advantages = advantages - advantages.mean()
    advantages[np.abs(advantages) <= 1e-9 * largest] = 0.0
    if normalize:
        advantages = advantages / (advantages.std(ddof=1) + 1e-8)
    if case["discount_states"]:
        advantages *= np.concatenate([gamma ** np.arange(end - first) for _, first, end in episodes])
    return advantages, np.concatenate(all_returns)


def choices_of(distribution, action_space):
    """Return the logits of each choice of a distribution of one step, from which the action is made."""
    inner = distribution.distribution
    if isinstance(action_space, spaces.MultiBinary):
        return [th.stack([th.zeros(()), logit]) for logit in inner.logits[0]]
    return [part.logits[0] for part in (inner if isinstance(inner, list) else [inner])]


def masked_terms(distribution, action, mask, action_space):
    """Return log-probability and entropy of one step, from the logits of its valid actions."""
    log_prob, entropy, start = 0.0, 0.0, 0
    for value, logits in zip(np.ravel(action), choices_of(distribution, action_space), strict=True):
        valid = np.flatnonzero(mask[start : start + len(logits)])
        start += len(logits)
        log_probs = logits[valid] - th.logsumexp(logits[valid], dim=0)
        log_prob = log_prob + log_probs[list(valid).index(int(value))]
        entropy = entropy - (log_probs.exp() * log_probs).sum()
    return log_prob, entropy


def terms(model, observations, actions, masks, case):
    """Return log-probabilities and entropies of an episode."""
    if not case["memory"] and masks is None:
        distribution = model.policy.get_distribution(observations)
        return distribution.log_prob(actions), distribution.entropy()
    if case["memory"]:
        distributions, _ = step_by_step(model.policy, observations)
    else:
        rows = [obs_of_step(observations, step) for step in range(len(actions))]
        distributions = [copy(model.policy.get_distribution(row)) for row in rows]
    pairs = []
    for step, distribution in enumerate(distributions):
        action = actions[step : step + 1]
        if masks is None:
            pairs.append((distribution.log_prob(action), distribution.entropy()))
        else:
            pairs.append(masked_terms(distribution, action, masks[step], model.action_space))
    return tuple(th.stack([value.reshape(()) for value in part]) for part in zip(*pairs, strict=True))


def reference_gradient(model, env, episodes, actions, advantages, case):
    """Return the gradient of the loss, summed episode by episode."""
    loss, row = 0.0, 0
    for i, first, end in episodes:
        rows = slice(row, row + end - first)
        observations = tensors_of([pick(env.observations, step, i) for step in range(first, end)])
        taken = actions[rows].flatten() if case["action"] == "discrete" else actions[rows].float()
        masks = [env.masks[step][i] for step in range(first, end)] if case["masked"] else None
        log_probs, entropy = terms(model, observations, taken, masks, case)
        loss = loss - (log_probs * th.as_tensor(advantages[rows]) + case["ent_coef"] * entropy).sum()
        row = rows.stop
    loss = loss / (len(episodes) if case["reduction"] == "episode" else row)
    parameters = [p for name, p in model.policy.named_parameters() if name not in critic_names(model)]
    gradients = th.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return th.cat([gradient.flatten() for gradient in gradients])


class RecordAll(RecordVec):
    """Record the infos, and the masks, too."""

    def reset(self):
        self.infos, self.masks = [], []
        return super().reset()

    def step_async(self, actions):
        if self.has_attr("action_masks"):
            self.masks.append(self.env_method("action_masks"))
        super().step_async(actions)

    def step_wait(self):
        result = super().step_wait()
        self.infos.append(result[3])
        return result


@pytest.mark.parametrize("baseline", BASELINES)
@settings(max_examples=max(1, N_CASES // len(BASELINES)), deadline=None, derandomize="FUZZ_CASES" not in os.environ,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(st.data())
def test_fast_and_slow_agree(baseline, data):
    case = data.draw(cases(baseline))
    case["masked"] &= case["action"] != "box"
    observation_space, action_space = OBSERVATIONS[case["observation"]], ACTIONS[case["action"]]
    makers = [
        lambda ends=ends, i=i: ScriptedEnv(
            spaces.Dict(observation_space.spaces) if case["observation"] == "dict" else observation_space,
            action_space, ends, case["scale"], case["seed"] + i, case["masked"],
        )
        for i, ends in enumerate(case["ends"])
    ]  # fmt: skip
    env = RecordAll(DummyVecEnv(makers))
    keys = ("n_episodes", "gamma", "gae_lambda", "returns", "baseline", "reduction", "discount_states",
            "normalize_advantage", "time_limit", "ent_coef", "group_size")  # fmt: skip
    policy = ("MultiInput" if case["observation"] == "dict" else "Mlp") + ("LstmPolicy" if case["memory"] else "Policy")
    of_memory = dict(lstm_hidden_size=3, rnn_class=getattr(th.nn, case["memory"])) if case["memory"] else {}
    model = make_model(env, policy, seed=case["seed"] % 1000, policy_kwargs=dict(net_arch=[4], **of_memory), target_kl=None,
                       n_value_epochs=1, **{key: case[key] for key in keys})  # fmt: skip
    case = resolved(case)
    collect(model)
    buffer = model.rollout_buffer

    # The batch
    episodes, groups, greedy = reference_episodes(env, case)
    assert [end - first for _, first, end in episodes] == buffer.lengths.tolist()
    assert [episode.env_idx for episode in buffer.episodes] == [i for i, _, _ in episodes]
    assert groups == buffer.groups.tolist()
    assert greedy.keys() == set(buffer.greedy_groups.tolist())
    if case["group_size"] > 1 or greedy:
        for group, (i, first, _) in [*zip(groups, episodes, strict=True), *greedy.items()]:
            other, begin, _ = episodes[groups.index(group)]
            starts = [tensors_of([pick(env.observations, step, j)]) for step, j in ((first, i), (begin, other))]
            for key in starts[0] if isinstance(starts[0], dict) else [...]:
                assert th.equal(*(start[key] for start in starts))
    if len(episodes) < 2:
        event("nothing to learn from")
        return
    batch = batch_of(model)
    rows = [(step, i) for i, first, end in episodes for step in range(first, end)]
    shown = tensors_of([pick(env.observations, step, i) for step, i in rows])
    for key in shown if isinstance(shown, dict) else [None]:
        stored, expected = (array if key is None else array[key] for array in (batch.observations, shown))
        np.testing.assert_array_equal(stored.float().flatten(), expected.float().flatten())
    taken = batch.actions.numpy()
    taken = np.clip(taken, action_space.low, action_space.high) if case["action"] == "box" else taken
    np.testing.assert_array_equal(taken.ravel(), np.ravel([env.actions[step][i] for step, i in rows]))
    np.testing.assert_array_equal(buffer.rewards, [env.rewards[step][i] for step, i in rows])

    # The advantages and the gradient
    advantages, returns = reference_advantages(model, env, episodes, groups, greedy, case)
    before = clone(model)
    gradients = gradient_of(model)
    spread = max(np.abs(advantages).max(), 0.0 if case["normalize_advantage"] else np.abs(returns).max())
    np.testing.assert_allclose(buffer.advantages, advantages, rtol=1e-4, atol=1e-4 * spread + 1e-6)
    names = [name for name, _ in model.policy.named_parameters() if name not in critic_names(model)]
    found = th.cat([gradients.get(name, th.zeros_like(before[name])).flatten() for name in names])
    expected = reference_gradient(model, env, episodes, batch.actions, buffer.advantages, case)
    scale = expected.abs().max().item()
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-3, atol=1e-3 * scale + 1e-6)
