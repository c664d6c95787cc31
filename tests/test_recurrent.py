"""Policies with memory, against the same policies taken step by step."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.ppo_recurrent import MlpLstmPolicy as LstmPolicyOfContrib
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn
from torch.nn.utils import parameters_to_vector

from sb3_reinforce import REINFORCE
from sb3_reinforce.batch import EpisodeRolloutBufferSamples
from sb3_reinforce.batch_policy import critic_parameters
from sb3_reinforce.masks import MaskLayout, mask_distribution
from sb3_reinforce.recurrent import ReinforceCnnLstmPolicy, ReinforceLstmPolicy, ReinforceMultiInputLstmPolicy
from sb3_reinforce.sampler import NumpySampler, TorchSampler, is_plain
from tests.envs import SpacesEnv
from tests.helpers import (
    actions_of_noise,
    assert_same,
    batch_of,
    clone,
    collect,
    gradient_of,
    logged,
    make_model,
    raises,
    record_noise,
    set_chunk_size,
    step_by_step,
    step_of,
    vector_of,
)

BOX = spaces.Box(-1, 1, (3,))
DICT = spaces.Dict(vector=spaces.Box(-1, 1, (2,)), cell=spaces.Discrete(3))
IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
SMALL = dict(lstm_hidden_size=5, net_arch=[4])

FIELDS = ("observations", "actions", "episode_starts", "action_masks")
LENGTHS = [3, 1, 7, 2, 7]
MASKED = ["lstm", "dict", "two layers"]

#: Policy class, spaces, arguments of the policy
CASES = {
    "lstm": (ReinforceLstmPolicy, BOX, spaces.Discrete(3), {}),
    "gru": (ReinforceLstmPolicy, BOX, spaces.Discrete(3), dict(rnn_class=nn.GRU)),
    "two layers": (ReinforceLstmPolicy, BOX, spaces.MultiBinary(2), dict(n_lstm_layers=2)),
    "two layers of a gru without bias": (
        ReinforceLstmPolicy, BOX, spaces.MultiDiscrete([2, 3]),
        dict(n_lstm_layers=2, rnn_class=nn.GRU, lstm_kwargs=dict(bias=False)),
    ),
    "shared memory": (ReinforceLstmPolicy, BOX, spaces.Discrete(3), dict(shared_lstm=True)),
    "critic without memory": (ReinforceLstmPolicy, BOX, spaces.Box(-1, 1, (2,)), dict(enable_critic_lstm=False)),
    "std": (ReinforceLstmPolicy, BOX, spaces.Box(-1, 1, (2,)), dict(state_dependent_std=True)),
    "std with a trunk": (ReinforceLstmPolicy, BOX, spaces.Box(-1, 1, (1,)), dict(state_dependent_std=True, std_net_arch=[6])),
    "dict": (ReinforceMultiInputLstmPolicy, DICT, spaces.Discrete(3), {}),
    "image": (
        ReinforceCnnLstmPolicy, IMAGE, spaces.Discrete(3),
        dict(share_features_extractor=False, features_extractor_kwargs=dict(features_dim=8)),
    ),
}  # fmt: skip


def make_policy(name, double=False):
    policy_class, observation_space, action_space, kwargs = CASES[name]
    th.manual_seed(0)
    policy = policy_class(observation_space, action_space, lambda _: 0.0, **SMALL, **kwargs)
    policy.set_training_mode(False)
    for parameter in policy.parameters():  # The last layer starts near zero
        parameter.data.add_(0.3 * th.randn_like(parameter))
    if double:  # SB3 turns all observations into single precision
        policy.double()
        for extractor in {policy.pi_features_extractor, policy.vf_features_extractor}:
            extractor.register_forward_pre_hook(lambda _, args: tuple(map(to_double, args)))
    return policy


def to_double(observations):
    if isinstance(observations, dict):
        return {key: value.double() for key, value in observations.items()}
    return observations.double()


def make_episodes(policy, lengths, masked=False):
    """Make batches of one episode each, with random observations and actions."""
    policy.observation_space.seed(0)
    policy.action_space.seed(0)
    generator = np.random.default_rng(0)
    episodes = []
    for length in lengths:
        sampled = [policy.observation_space.sample() for _ in range(length)]
        stacked = {key: np.stack([each[key] for each in sampled]) for key in sampled[0]} if policy_is_dict(policy) else sampled
        observations, _ = policy.obs_to_tensor(stacked if policy_is_dict(policy) else np.stack(stacked))
        masks = None
        actions = np.stack([policy.action_space.sample() for _ in range(length)])
        is_discrete = isinstance(policy.action_space, spaces.Discrete)
        if masked:
            parts = MaskLayout(policy.action_space).parts
            masks = generator.random((length, sum(parts))) < 0.5
            taken = np.cumsum([0, *parts[:-1]]) + actions.reshape(length, -1)
            np.put_along_axis(masks, taken, True, axis=1)
            masks = th.as_tensor(masks)
        starts = th.arange(length) == 0
        taken = th.as_tensor(actions if is_discrete else actions.astype(np.float32))
        episodes.append(EpisodeRolloutBufferSamples(observations, taken, episode_starts=starts, action_masks=masks))
    return episodes


def policy_is_dict(policy):
    return isinstance(policy.observation_space, spaces.Dict)


def join(parts):
    """Join tensors or dicts of them."""
    if parts[0] is None:
        return None
    return {key: th.cat([part[key] for part in parts]) for key in parts[0]} if isinstance(parts[0], dict) else th.cat(parts)


def join_episodes(episodes):
    return EpisodeRolloutBufferSamples(**{name: join([getattr(episode, name) for episode in episodes]) for name in FIELDS})


def one_by_one(policy, episode):
    """Return the log-probabilities and the values of an episode, a step at a time."""
    distributions, values = step_by_step(policy, episode.observations)
    masks = [None] * len(values) if episode.action_masks is None else episode.action_masks.split(1)
    log_probs = [
        mask_distribution(distribution, mask).log_prob(action)
        for distribution, mask, action in zip(distributions, masks, episode.actions.split(1), strict=True)
    ]
    return th.cat(log_probs), values


@pytest.mark.parametrize(
    "name, masked", [(name, False) for name in CASES] + [("lstm", True), ("dict", True), ("two layers", True)]
)
def test_a_batch_is_its_episodes_step_by_step(name, masked):
    """Log-probabilities, values and their gradients, in double precision."""
    policy = make_policy(name, double=True)
    episodes = make_episodes(policy, LENGTHS, masked)
    batch = join_episodes(episodes)
    parameters = list(policy.parameters())
    log_prob, values = policy.distribution(batch).log_prob(batch.actions), policy.values(batch)
    expected = map(th.cat, zip(*(one_by_one(policy, episode) for episode in episodes), strict=True))
    weights = th.randn(sum(LENGTHS), generator=th.Generator().manual_seed(0)).double()
    for found, wanted in zip((log_prob, values), expected, strict=True):
        np.testing.assert_allclose(found.detach(), wanted.detach(), rtol=1e-9, atol=1e-9)
        gradients = [
            th.autograd.grad((weights * x).sum(), parameters, allow_unused=True, materialize_grads=True, retain_graph=True)
            for x in (found, wanted)
        ]
        for left, right in zip(*gradients, strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_memory_ends_with_the_episode(name):
    """The order of the episodes changes nothing; what came before in the same episode does."""
    policy = make_policy(name, double=True)
    episodes = make_episodes(policy, LENGTHS)
    parts = policy.distribution(join_episodes(episodes)).distribution.logits.split(LENGTHS)
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        permuted = policy.distribution(join_episodes([episodes[i] for i in order])).distribution.logits
        np.testing.assert_allclose(permuted.detach(), th.cat([parts[i] for i in order]).detach(), rtol=1e-12)
    changed = episodes[2]._replace(observations=episodes[2].observations.clone())
    changed.observations[0] += 0.5
    logits = policy.distribution(join_episodes([*episodes[:2], changed, *episodes[3:]])).distribution.logits.split(LENGTHS)
    assert all(th.equal(a, b) for i, (a, b) in enumerate(zip(logits, parts, strict=True)) if i != 2)
    assert ((logits[2] - parts[2]).abs().amax(dim=1) > 1e-6).all()


# The sampler


@pytest.mark.parametrize("n_envs", [1, 4])
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][1] is BOX])
def test_numpy_remembers_what_pytorch_does(name, n_envs):
    """The same noise gives the same actions over steps, ends of episodes, and parameters that move."""
    policy = make_policy(name)
    assert is_plain(policy)
    fast, starts, states = NumpySampler(policy, n_envs), np.ones(n_envs, dtype=bool), None
    draws = record_noise(fast)
    generator = np.random.default_rng(0)
    for step in range(30):
        obs = generator.uniform(-1, 1, (n_envs, 3)).astype(np.float32)
        actions = fast(obs)
        batch = EpisodeRolloutBufferSamples(th.as_tensor(obs), episode_starts=th.as_tensor(starts))
        with th.no_grad():
            distribution, states = policy.step(batch, states)
        expected = actions_of_noise(distribution, draws[-1], policy.action_space)
        np.testing.assert_allclose(actions.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)
        starts = generator.random(n_envs) < 0.3
        fast.start_episodes(starts)
        if step == 10:
            for parameter in policy.parameters():
                parameter.data = 1.1 * parameter.data


@pytest.mark.parametrize("name", ["dict", "image"])
def test_pytorch_samples_for_the_rest(name):
    assert not is_plain(make_policy(name))


def test_pytorch_sampler_forgets_at_the_start_of_an_episode():
    policy = make_policy("lstm")
    sampler = TorchSampler(policy, 2)
    obs = np.ones((2, 3), dtype=np.float32)
    sampler(obs)
    first = [state.clone() for state in sampler._states]
    sampler(obs)
    sampler.start_episodes(np.array([True, False]))
    sampler(obs)
    for then, now in zip(first, sampler._states, strict=True):
        np.testing.assert_allclose(now[:, 0], then[:, 0], rtol=1e-6)
        assert (now[:, 1] - then[:, 1]).abs().max() > 1e-3


# The update


class UnevenEnv(SpacesEnv):
    """Random observations and rewards in episodes of 2, 5, 3, 7 steps, over and over, every other one cut off."""

    episode = -1

    def reset(self, **kwargs):
        self.episode += 1
        self.length, self.truncate = (2, 5, 3, 7)[self.episode % 4], self.episode % 2 == 1
        return super().reset(**kwargs)


def make_recurrent(name="lstm", **kwargs):
    policy_class, observation_space, action_space, policy_kwargs = CASES[name]
    kwargs = {"n_episodes": 6, "policy_kwargs": {**SMALL, **policy_kwargs}, **kwargs}
    return make_model(UnevenEnv(observation_space, action_space), policy_class, **kwargs)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("baseline", [None, "mean", "leave_one_out", "timestep", "linear", "value"])
def test_all_baselines(name, baseline):
    """An update with the natural gradient, for all policies and baselines."""
    if (name not in ("lstm", "gru") and baseline != "value") or (name, baseline) == ("image", "linear"):
        pytest.skip("One baseline is enough")
    model = make_recurrent(name, baseline=baseline, natural_gradient=True, target_kl=0.01, time_limit=None)
    before = clone(model)
    model.learn(1)
    assert 0 < logged(model)["train/approx_kl"] <= 0.02
    assert any("lstm_actor" in key for key, value in clone(model).items() if not th.equal(value, before[key]))


@pytest.mark.parametrize("name", ["lstm", "gru", "dict"])
@pytest.mark.parametrize("ent_coef", [0.0, 0.1])
def test_chunks_do_not_cut_episodes(name, ent_coef):
    """Gradient and step are the same in parts of about eight steps."""
    found = []
    for size in (1000, 8):
        model = make_recurrent(name, learning_rate=0.0, ent_coef=ent_coef, natural_gradient=True, target_kl=None)
        model.learn(1)
        set_chunk_size(model, size)
        gradient = vector_of(gradient_of(model))
        found.append((gradient, vector_of(step_of(model, learning_rate=1.0))))
    assert [len(part.actions) for part in model.rollout_buffer.chunks(8, True)] == [7, 3, 7, 7]
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=1e-4 * np.abs(one).max())


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_the_natural_gradient_is_that_of_the_fisher_matrix(name):
    """Which is written out, from each step of each episode."""
    damping = 0.05
    model = make_recurrent(
        name, learning_rate=0.0, natural_gradient=True, target_kl=None, cg_damping=damping, cg_max_steps=500
    )
    model.learn(1)
    for parameter in model.policy.parameters():
        parameter.data.add_(0.3 * th.randn(parameter.shape, generator=th.Generator().manual_seed(1)))
    plain = gradient_of(model)
    parameters = [parameter for key, parameter in model.policy.named_parameters() if key in plain]
    log_probs = model.policy.distribution(batch_of(model)).distribution.logits
    fisher = 0
    for log_prob in log_probs.flatten():
        slope = parameters_to_vector(th.autograd.grad(log_prob, parameters, retain_graph=True)).double()
        fisher = fisher + log_prob.exp().item() * np.outer(slope, slope) / len(log_probs)
    expected = np.linalg.solve(fisher + damping * np.eye(len(fisher)), vector_of(plain))
    natural = -vector_of(step_of(model, learning_rate=1.0), plain)
    assert np.linalg.norm(natural - expected) < 1e-3 * np.linalg.norm(expected)
    assert natural @ vector_of(plain) < 0.99 * np.linalg.norm(natural) * np.linalg.norm(vector_of(plain))


@pytest.mark.parametrize("name", ["lstm", "gru", "shared memory", "critic without memory"])
def test_the_value_after_a_time_limit_remembers_the_episode(name):
    model = make_recurrent(name, baseline="value", time_limit="bootstrap", gae_lambda=1.0, normalize_advantage=False)
    before = clone(model)
    model.learn(1)
    model.policy.load_state_dict(before)
    buffer = model.rollout_buffer
    for episode in buffer.episodes:
        observations = np.concatenate([episode.observations, episode.terminal_observation[None]])
        with th.no_grad():
            last = step_by_step(model.policy, th.as_tensor(observations))[1][-1].item()
        expected = episode.rewards[-1] + (model.gamma * last if episode.truncated else 0)
        assert buffer.returns[episode._steps][-1] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert any(episode.truncated for episode in buffer.episodes)


@pytest.mark.parametrize("name", ["lstm", "shared memory", "critic without memory"])
def test_parameters_of_the_critic(name):
    """What the actor remembers is learned by the policy gradient alone."""
    policy = make_policy(name)
    names = {key for key, parameter in policy.named_parameters() if any(parameter is p for p in critic_parameters(policy))}
    own = {"lstm": "lstm_critic.", "critic without memory": "critic."}.get(name, "value_net.")
    assert any(key.startswith(own) for key in names)
    assert not any(key.startswith(("lstm_actor", "action_net", "mlp_extractor.policy_net")) for key in names)
    model = make_recurrent(name, baseline="value", learning_rate=0.0, natural_gradient=True, target_kl=None)
    before = clone(model)
    model.learn(1)
    moved = {key for key, value in clone(model).items() if not th.equal(value, before[key])}
    assert moved == names


def test_the_critic_learns_from_whole_episodes():
    """Minibatches hold each episode once, whole, and about as many steps as asked for."""
    model = make_recurrent()
    collect(model)
    buffer = model.rollout_buffer
    samples = list(buffer.get_minibatches(10, whole_episodes=True))
    assert [size for _, size in samples] == [len(sample.actions) for sample, _ in samples]
    assert len(samples) == 3 and sum(size for _, size in samples) == buffer.n_steps
    rows = np.concatenate([sample.observations.numpy() for sample, _ in samples])
    assert sorted(map(tuple, rows)) == sorted(map(tuple, buffer.observations))
    starts = np.concatenate([sample.episode_starts for sample, _ in samples])
    assert sorted(np.diff(np.flatnonzero(starts), append=len(starts))) == sorted(buffer.lengths)


# As an SB3 algorithm


@pytest.mark.parametrize("name", CASES)
def test_save_and_load(name, tmp_path):
    model = make_recurrent(name).learn(1)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    assert_same(REINFORCE.load(tmp_path / "model", device="cpu").policy.state_dict(), model.policy.state_dict())
    assert_same(type(model.policy).load(tmp_path / "policy", device="cpu").state_dict(), model.policy.state_dict())


def test_names_of_the_policies():
    image = DummyVecEnv([lambda: FakeImageEnv(screen_height=36, screen_width=36, n_channels=1)] * 2)
    for policy, env, policy_class in (
        ("MlpLstmPolicy", UnevenEnv(BOX, spaces.Discrete(2)), ReinforceLstmPolicy),
        ("CnnLstmPolicy", image, ReinforceCnnLstmPolicy),
        ("MultiInputLstmPolicy", UnevenEnv(DICT, spaces.Discrete(2)), ReinforceMultiInputLstmPolicy),
    ):
        assert type(REINFORCE(policy, env).policy) is policy_class


def test_predict_carries_the_memory_on():
    model = make_recurrent("std")
    obs = np.ones((2, 3), dtype=np.float32)
    first, states = model.predict(obs, episode_start=np.ones(2, dtype=bool), deterministic=True)
    second, states = model.predict(obs, states, np.array([True, False]), deterministic=True)
    np.testing.assert_allclose(second[0], first[0], rtol=1e-6)
    assert np.abs(second[1] - first[1]).max() > 1e-5


def test_evaluation_and_normalization():
    env = VecNormalize(DummyVecEnv([lambda: UnevenEnv(BOX, spaces.Discrete(3))] * 2))
    eval_env = VecNormalize(DummyVecEnv([lambda: UnevenEnv(BOX, spaces.Discrete(3))]), training=False)
    with pytest.warns(UserWarning, match="Monitor"):
        callback = EvalCallback(eval_env, eval_freq=10, n_eval_episodes=3, verbose=0)
        model = make_model(env, "MlpLstmPolicy", n_episodes=4).learn(40, callback=callback)
        evaluate_policy(model, env, 3)
    assert np.isfinite(callback.last_mean_reward)


@pytest.mark.parametrize(
    "kwargs, parts",
    [
        (dict(rnn_class=nn.RNN), ["rnn_class=", "LSTM", "GRU"]),
        (dict(lstm_kwargs=dict(bidirectional=True)), ["lstm_kwargs={'bidirectional': True} can have bias, dropout"]),
        (dict(shared_lstm=True, enable_critic_lstm=True), ["shared_lstm=True needs enable_critic_lstm=False"]),
        (dict(shared_lstm=True, share_features_extractor=False), ["share_features_extractor=True"]),
    ],
)
def test_errors(kwargs, parts):
    with raises(*parts):
        make_model(gym.make("CartPole-v1"), "MlpLstmPolicy", policy_kwargs=kwargs)


def test_the_policy_of_contrib():
    with raises("MlpLstmPolicy"):
        make_model(gym.make("CartPole-v1"), LstmPolicyOfContrib)
