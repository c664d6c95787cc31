"""Invalid-action masks: where they come from, what they do to distributions and to the update."""

from copy import deepcopy
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_with_masks
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.distributions import BernoulliDistribution, make_proba_distribution
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from torch.distributions import Bernoulli, Categorical, kl_divergence

from sb3_reinforce import REINFORCE
from sb3_reinforce.batch_policy import divergence
from sb3_reinforce.compare.references import ReferenceModel, evaluate_reference
from sb3_reinforce.masks import MaskedModel, MaskLayout, mask_distribution
from sb3_reinforce.policies import ReinforcePolicy
from sb3_reinforce.sampler import NumpySampler, TorchSampler
from tests.envs import MaskEnv, SpacesEnv, is_valid, some_masks
from tests.helpers import (
    Batches,
    batch_of,
    collect,
    gradient_of,
    make_model,
    raises,
    set_actions,
    step_of,
    store_batch,
    vector_of,
)

ACTION_SPACES = {
    "discrete": spaces.Discrete(4),
    "multi-discrete": spaces.MultiDiscrete([2, 4, 3]),
    "multi-binary": spaces.MultiBinary(3),
}


def make_env(n_envs=1, vec_env_class=DummyVecEnv, **kwargs):
    return vec_env_class([lambda: Monitor(MaskEnv(**kwargs))] * n_envs)


def policy_of(env):
    return "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"


# Distributions


def valid_outcomes(logits, mask, action_space):
    """Return one distribution per choice, over its valid actions only, and the values that they stand for."""
    found, start, logit = [], 0, 0
    for size in MaskLayout(action_space).parts:
        values = np.flatnonzero(mask[start : start + size])
        if isinstance(action_space, spaces.MultiBinary):
            choice = th.stack([th.zeros(()).double(), logits[logit]])  # The logit of 1 against 0
            logit += 1
        else:
            choice = logits[start : start + size]
        found.append((Categorical(logits=choice[values]), list(values)))
        start += size
    return found


def network_size(action_space):
    return action_space.n if isinstance(action_space, spaces.MultiBinary) else MaskLayout(action_space).size


@pytest.mark.parametrize("name", ACTION_SPACES)
def test_distributions_are_those_over_the_valid_actions(name):
    """Log-probability, entropy and divergence, their gradients, and that of the divergence: by hand, in double precision."""
    action_space, n = ACTION_SPACES[name], 50
    masks = some_masks(action_space, n)
    generator = th.Generator().manual_seed(0)
    old, new = (th.randn(n, network_size(action_space), generator=generator).double().requires_grad_() for _ in range(2))

    def make(logits):
        distribution = make_proba_distribution(action_space).proba_distribution(logits)
        return mask_distribution(distribution, th.as_tensor(masks))

    one, other = make(old), make(new)
    actions = one.sample()
    by_hand = [
        (valid_outcomes(old[i], masks[i], action_space), valid_outcomes(new[i], masks[i], action_space)) for i in range(n)
    ]
    log_probs, entropies, divergences = [], [], []
    for i, (first, second) in enumerate(by_hand):
        taken = actions[i].reshape(-1)
        indices = [th.tensor(values.index(int(value))) for value, (_, values) in zip(taken, first, strict=True)]
        log_probs.append(sum(part.log_prob(index) for index, (part, _) in zip(indices, first, strict=True)))
        entropies.append(sum(part.entropy() for part, _ in first))
        divergences.append(sum(kl_divergence(p, q) for (p, _), (q, _) in zip(first, second, strict=True)))
    found_kl = divergence(one, other)
    for found, expected in (
        (one.log_prob(actions), log_probs),
        (one.entropy(), entropies),
        (found_kl if found_kl.dim() == 1 else found_kl.sum(dim=1), divergences),
    ):
        expected = th.stack(expected)
        np.testing.assert_allclose(found.detach(), expected.detach(), rtol=1e-9, atol=1e-9)
        weights = th.arange(1, n + 1) / n
        for left, right in zip(
            *(th.autograd.grad((x * weights).sum(), [old, new], retain_graph=True, materialize_grads=True, allow_unused=True)
              for x in (found, expected)), strict=True,
        ):  # fmt: skip
            np.testing.assert_allclose(left, right, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", [NumpySampler, TorchSampler])
@pytest.mark.parametrize("name", ACTION_SPACES)
def test_no_invalid_action_in_a_million(name, kind):
    """Also where the network all but insists on an invalid action."""
    action_space, n_envs = ACTION_SPACES[name], 1000
    th.manual_seed(0)
    masks = some_masks(action_space, n_envs)
    policy = ReinforcePolicy(spaces.Box(-1, 1, (2,)), action_space, lambda _: 0.0)
    policy.action_net.weight.data.mul_(1e4)  # Logits of up to about 100
    sampler = kind(policy, n_envs)
    columns = MaskLayout(action_space).starts
    seen = np.zeros(masks.shape, dtype=int)
    for _ in range(1000):
        obs = np.random.default_rng(len(columns)).uniform(-1, 1, (n_envs, 2)).astype(np.float32)
        actions = sampler(obs, masks).reshape(n_envs, -1).astype(int)
        np.add.at(seen, (np.arange(n_envs)[:, None], columns + actions), 1)
    assert seen.sum() == 1_000_000 * len(columns)
    assert not seen[~masks].any()


@pytest.mark.parametrize("name", ACTION_SPACES)
def test_both_samplers_draw_from_the_masked_distribution(name):
    """40000 samples at 5 standard errors: a false alarm once in a million."""
    action_space, n = ACTION_SPACES[name], 40_000
    th.manual_seed(0)
    mask = some_masks(action_space, 5)[4]
    policy = ReinforcePolicy(spaces.Box(-1, 1, (2,)), action_space, lambda _: 0.0)
    policy.action_net.weight.data.mul_(100)
    obs, masks = np.tile(np.float32([0.3, -0.8]), (n, 1)), np.tile(mask, (n, 1))
    with th.no_grad():
        logits = policy.action_net(policy.mlp_extractor.forward_actor(th.as_tensor(obs[:1])))[0].double()
    columns = MaskLayout(action_space).starts
    for kind in (NumpySampler, TorchSampler):
        actions = kind(policy, n)(obs, masks).reshape(n, -1)
        for i, (part, values) in enumerate(valid_outcomes(logits, mask, action_space)):
            for p, value in zip(part.probs.tolist(), values, strict=True):
                share = (actions[:, i] == value).mean()
                assert abs(share - p) <= 5 * np.sqrt(p * (1 - p) / n) + 1e-12, (kind, columns[i], value)


@pytest.mark.parametrize("name", ["discrete", "multi-binary"])
def test_the_update_with_masks_is_that_of_the_smaller_problem(name):
    """
    Where a mask always excludes the last action (fixes the last number), gradient and natural step are those of a policy that
    never had it.
    """
    if name == "discrete":
        large, small, mask = spaces.Discrete(3), spaces.Discrete(2), [1, 1, 0]
    else:
        large, small, mask = spaces.MultiBinary(3), spaces.MultiBinary(2), [1, 1, 1, 1, 1, 0]
    generator = np.random.default_rng(0)
    shape = () if name == "discrete" else (2,)
    episodes = [
        (
            generator.uniform(-1, 1, (n, 2)).astype(np.float32),
            generator.integers(2, size=(n, *shape)),
            generator.normal(size=n),
        )
        for n in (3, 1, 4)
    ]
    kwargs = dict(policy_kwargs=dict(net_arch=[4]), natural_gradient=True, target_kl=1e-4, ent_coef=0.1, baseline=None)
    models = [make_model(SpacesEnv(spaces.Box(-1, 1, (2,)), space), **kwargs) for space in (large, small)]
    models[0].policy.action_net.weight.data.normal_(generator=th.Generator().manual_seed(0))
    state = models[0].policy.state_dict()
    models[1].policy.load_state_dict({key: value[:2] if "action_net" in key else value for key, value in state.items()})
    for model in models:
        model._setup_learn(1)
    masks = [np.tile(np.array(mask, dtype=bool), (len(rewards), 1)) for _, _, rewards in episodes]
    padded = [(obs, np.pad(actions, [(0, 0), (0, 1)]) if shape else actions, rewards) for obs, actions, rewards in episodes]
    store_batch(models[0].rollout_buffer, padded, action_masks=masks)
    store_batch(models[1].rollout_buffer, episodes)
    gradients, steps = [gradient_of(model) for model in models], [step_of(model) for model in models]
    for of_large, of_small in (gradients, steps):
        for key, value in of_small.items():
            found = of_large[key][:2] if "action_net" in key else of_large[key]
            np.testing.assert_allclose(found, value, rtol=1e-3, atol=1e-5 * np.abs(vector_of(of_small)).max())
        np.testing.assert_allclose(of_large["action_net.weight"][2], 0, atol=1e-6 * np.abs(vector_of(of_small)).max())


# Where they come from


@pytest.mark.parametrize("action", ACTION_SPACES)
@pytest.mark.parametrize("offer", ["method", "info", "observation"])
@pytest.mark.parametrize("n_envs, vec_env_class", [(1, DummyVecEnv), (3, DummyVecEnv), (2, SubprocVecEnv)])
def test_masks_are_those_of_the_environment(offer, action, n_envs, vec_env_class, capsys):
    """The observation shows the mask, and an environment fails at an invalid action. Episodes of all lengths end early."""
    if vec_env_class is SubprocVecEnv and action != "discrete":
        pytest.skip("Processes do not depend on the actions")
    env = make_env(n_envs, vec_env_class, offer=offer, action_space=ACTION_SPACES[action])
    seen = Batches(lambda buffer: (buffer.observations, buffer.action_masks))
    model = REINFORCE(policy_of(env), env, n_episodes=5, seed=0, verbose=1, use_sde=False).learn(60, seen, log_interval=None)
    assert len(seen.results) >= 2
    for observations, masks in seen.results:
        shown = observations["shown"] if offer == "observation" else observations
        np.testing.assert_array_equal(masks, shown == 1)
    printed = {"method": "the method 'action_masks'", "info": "infos", "observation": "observations"}[offer]
    assert [line for line in capsys.readouterr().out.splitlines() if "masks" in line and printed.split("'")[0] in line]
    assert model.mask_source == offer
    env.close()


def test_masks_can_be_ignored(capsys):
    env = make_env()
    model = REINFORCE("MlpPolicy", env, n_episodes=5, seed=0, verbose=1, use_masking=False)
    with pytest.raises(AssertionError, match="An invalid action"):
        model.learn(100)
    assert "masks" not in capsys.readouterr().out


def test_action_masker_and_taxi():
    env = ActionMasker(MaskEnv(offer=None), lambda env: env.mask)
    assert make_model(env).learn(50).mask_source == "method"
    taxi = max(name for name in gym.registry if name.startswith("Taxi-v"))  # The only one that can be made
    model = make_model(gym.make(taxi, max_episode_steps=20), n_episodes=2).learn(100)
    assert model.mask_source == "info"
    assert 0.2 < model.rollout_buffer.action_masks.mean() < 0.9


def test_without_masks_there_is_no_column():
    model = make_model(MaskEnv(offer=None, action_space=spaces.Discrete(1))).learn(1)
    assert model.rollout_buffer.action_masks is None and batch_of(model).action_masks is None
    model.set_env(MaskEnv(action_space=spaces.Discrete(1)))
    collect(model)
    assert batch_of(model).action_masks.shape == (len(model.rollout_buffer.rewards), 1)


# Evaluation


@pytest.mark.parametrize("offer", ["method", "info", "observation"])
@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy"])
def test_evaluation_goes_by_the_masks(offer, policy, tmp_path):
    """An environment fails at an invalid action, which the most likely one often is."""
    env, eval_env = make_env(offer=offer), make_env(2, offer=offer, lengths=(4, 2, 7))
    policy = policy.replace("Mlp", "MultiInput") if offer == "observation" else policy
    callback = EvalCallback(eval_env, eval_freq=20, n_eval_episodes=4, verbose=0, best_model_save_path=tmp_path)
    model = make_model(env, policy).learn(100, callback=callback)
    assert np.isfinite(callback.last_mean_reward)
    loaded = REINFORCE.load(tmp_path / "best_model", device="cpu")
    assert loaded.mask_source == offer
    for each in (model, loaded):
        for deterministic in (True, False):
            evaluate_policy(MaskedModel(each, eval_env), eval_env, deterministic=deterministic)
    if offer == "observation":
        evaluate_policy(loaded, eval_env)
    else:
        with pytest.warns(UserWarning, match="has learned with action masks"):
            loaded.predict(eval_env.reset())
    if offer == "method" and policy == "MlpPolicy":
        evaluate_with_masks(loaded, eval_env)
    elif offer == "method":  # It forgets the state of the policy
        with pytest.warns(UserWarning, match="go on with an episode without its state"):
            evaluate_with_masks(loaded, eval_env)


@pytest.mark.parametrize("memory", [False, True])
def test_a_masked_model_is_the_model_besides(memory):
    """What is read and set is that of the model, a copy is one, and a policy with memory gets its states back."""
    env = make_env()
    model = make_model(env, "MlpLstmPolicy" if memory else "MlpPolicy")
    masked = deepcopy(MaskedModel(model, env))
    assert masked._model is not model and masked.gamma == model.gamma
    masked = MaskedModel(model, env)
    masked.gamma = 0.5
    assert model.gamma == 0.5 and "gamma" not in vars(masked)
    with mock.patch.object(model.policy, "predict", side_effect=model.policy.predict) as predict:
        evaluate_policy(masked, env, n_eval_episodes=2)
    assert predict.call_count > 2
    for i, call in enumerate(predict.call_args_list):
        assert (call.args[1] is None) == (i == 0 or not memory)


@pytest.mark.parametrize("name", ACTION_SPACES)
def test_predict(name):
    model = make_model(MaskEnv(action_space=ACTION_SPACES[name]))
    space = model.observation_space
    for mask in some_masks(model.action_space, 30):
        for deterministic in (True, False):
            action, _ = model.predict(space.sample(), action_masks=mask, deterministic=deterministic)
            assert action.shape == model.action_space.shape and is_valid(action, mask, model.action_space)
    masks = some_masks(model.action_space, 30)
    actions, _ = model.predict(np.stack([space.sample() for _ in masks]), action_masks=masks)
    assert all(is_valid(action, mask, model.action_space) for action, mask in zip(actions, masks, strict=True))


@pytest.mark.parametrize("offer", ["method", "info", "observation"])
@pytest.mark.parametrize("name", ACTION_SPACES)
def test_policies_that_learn_nothing(name, offer):
    """The random actions of ``compare`` are valid, too; each valid one is as likely."""
    gym.register("Masked-v0", MaskEnv, kwargs=dict(offer=offer, action_space=ACTION_SPACES[name], lengths=(5,)))
    try:
        for reference in ("random", "zero_action"):
            assert len(evaluate_reference(reference, "Masked-v0", 0, 20, {})) == 20
    finally:
        del gym.registry["Masked-v0"]


def test_random_valid_actions_are_uniform():
    """4000 draws at 5 standard errors."""
    space = spaces.MultiDiscrete([3, 4])
    space.seed(0)
    valid = np.array([1, 0, 1, 0, 1, 1, 1], dtype=bool)
    model = ReferenceModel("random", space)
    drawn = np.concatenate([model.predict(None, action_masks=valid[None])[0] for _ in range(4000)])
    for column, start, size, n in ((0, 0, 3, 2), (1, 3, 4, 3)):
        shares = np.bincount(drawn[:, column], minlength=size) / 4000
        expected = valid[start : start + size] / n
        assert (np.abs(shares - expected) <= 5 * np.sqrt(expected * (1 - expected) / 4000)).all()


# Errors


def test_masks_that_do_not_fit():
    discrete, several = ACTION_SPACES["discrete"], ACTION_SPACES["multi-discrete"]
    with raises("Action masks have shape (1, 3)", "needs (1, 4)"):
        MaskLayout(discrete).check([[1, 0, 1]], 1)
    with raises("No action is valid in environment 1", "[0 0 0 0]"):
        MaskLayout(discrete).check([[1, 0, 1, 0], [0, 0, 0, 0]], 2)
    with raises("No action is valid for choice 1 in environment 0"):
        MaskLayout(several).check([[1, 1, 0, 0, 0, 0, 1, 1, 1]], 1)
    with raises("other numbers than 0 and 1", "norm_obs_keys"):
        MaskLayout(discrete).check([[1.0, 0.3, 1.0, 1.0]], 1)
    with raises("cannot be masked", "use_masking=False"):
        MaskLayout(spaces.Box(-1, 1, (2,)))
    with raises("Action masks are of unlike shapes", "needs (2, 4)"):
        MaskLayout(discrete).check([[1, 0, 1], [1, 0, 1, 0]], 2)
    with raises("Action masks are of unlike shapes", "needs (1, 9), the choices of each environment end to end"):
        MaskLayout(several).check([([1, 1], [1, 0, 0, 1], [1, 1, 1])], 1)


@pytest.mark.parametrize("n_masks, n_observations", [(1, 2), (2, 3), (3, 1)])
def test_as_many_masks_as_observations(n_masks, n_observations):
    model = make_model(MaskEnv())
    observations = np.stack([model.observation_space.sample() for _ in range(n_observations)])
    with raises(f"{n_masks} action masks were given for {n_observations} observations"):
        model.predict(observations, action_masks=some_masks(model.action_space, n_masks))


def test_an_environment_without_a_valid_action():
    env = MaskEnv()
    env.masks[12:500] = False
    model = make_model(env)
    before = vector_of(model.policy.state_dict())
    with raises("No action is valid in environment 0"):
        model.learn(100)
    np.testing.assert_array_equal(vector_of(model.policy.state_dict()), before)


def test_normalized_masks():
    env = VecNormalize(make_env(offer="observation"), norm_reward=False)
    with raises("Action masks hold other numbers than 0 and 1", "norm_obs_keys"):
        make_model(env, "MultiInputPolicy").learn(10)
    env = VecNormalize(make_env(offer="observation"), norm_reward=False, norm_obs_keys=["shown"])
    make_model(env, "MultiInputPolicy").learn(10)


def test_an_actor_that_ignores_its_mask():
    env = ActionMasker(MaskEnv(offer=None, action_space=spaces.Discrete(4)), lambda env: np.array([True, False, True, False]))
    env.unwrapped.masks[:] = True  # Which lets the environment take any action
    model = make_model(env)
    set_actions(model, lambda obs: np.ones(len(obs), dtype=int))
    with raises("has taken the action [1]", "[1 0 1 0] excludes"):
        model.learn(10)


def test_policies_that_know_no_masks():
    with raises("ActorCriticPolicy.predict takes none", "use_masking=False"):
        make_model(MaskEnv(), ActorCriticPolicy).learn(1)
    with pytest.raises(AssertionError, match="An invalid action"):
        make_model(MaskEnv(), ActorCriticPolicy, use_masking=False).learn(100)


def test_masks_of_continuous_actions():
    class Continuous(MaskEnv):
        def step(self, action):
            return super().step(0)

    env = Continuous()
    env.action_space, env.masks[:] = spaces.Box(-1, 1, (1,)), True
    with raises("cannot be masked", "use_masking=False"):
        make_model(env).learn(1)


def test_a_bernoulli_with_a_fixed_number():
    """Its probability is exactly one, its entropy exactly zero."""
    distribution = BernoulliDistribution(2).proba_distribution(th.tensor([[3.0, -2.0]]))
    masked = mask_distribution(distribution, th.tensor([[True, False, True, True]]))
    assert isinstance(masked.distribution, Bernoulli)
    assert masked.distribution.probs[0, 0] == 0
    assert masked.entropy().item() == pytest.approx(Bernoulli(logits=th.tensor(-2.0)).entropy().item())
