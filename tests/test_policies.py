import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.distributions import Normal

from sb3_reinforce import CnnPolicy, MlpPolicy, MultiInputPolicy
from tests.envs import CountEnv, SpacesEnv
from tests.helpers import LinearExtractor, assert_same, changed, clone, critic_names, make_model

VECTOR = spaces.Box(-1, 1, (3,))
IMAGE = spaces.Box(0, 255, (1, 36, 36), dtype=np.uint8)
DICT = spaces.Dict(vector=VECTOR, image=IMAGE)
ACTION = spaces.Box(-5, 5, (2,))

SHARED_TRUNK = dict(state_dependent_std=True)
TWO_TRUNKS = dict(state_dependent_std=True, std_net_arch=[16, 8])
both_heads = pytest.mark.parametrize("std_kwargs", [SHARED_TRUNK, TWO_TRUNKS], ids=["shared trunk", "two trunks"])
all_observations = pytest.mark.parametrize(
    "policy_class, space",
    [(MlpPolicy, VECTOR), (CnnPolicy, IMAGE), (MultiInputPolicy, DICT)],
    ids=["Mlp", "Cnn", "MultiInput"],
)


def make_policy(policy_class=MlpPolicy, observation_space=VECTOR, action_space=ACTION, **kwargs):
    th.manual_seed(0)
    return policy_class(observation_space, action_space, lambda _: 1e-2, **kwargs)


def observations(n=32, scale=1.0):
    return scale * th.randn(n, 3, generator=th.Generator().manual_seed(0))


def normal(policy, obs):
    distribution = policy.get_distribution(obs).distribution
    assert isinstance(distribution, Normal)
    return distribution


@both_heads
@pytest.mark.parametrize("log_std_init", [-2.0, 0.0, 0.5])
def test_initial_std(std_kwargs, log_std_init):
    policy = make_policy(log_std_init=log_std_init, min_std=0.1, **std_kwargs)
    # Where the head's input is zero the bias is all there is; elsewhere its small weights add a little
    np.testing.assert_allclose(normal(policy, th.zeros(1, 3)).stddev.detach(), np.exp(log_std_init), rtol=1e-5)
    stddev = normal(policy, observations()).stddev.detach()
    np.testing.assert_allclose(stddev, np.exp(log_std_init), rtol=0.1)
    assert stddev.unique().numel() == stddev.numel()


RANGES = spaces.Box(np.array([-1, 50, -np.inf, 0, -3e38], np.float32), np.array([1, 100, np.inf, 0, 3e38], np.float32))


@pytest.mark.parametrize("std_kwargs", [{}, SHARED_TRUNK, TWO_TRUNKS], ids=["parameter", "shared trunk", "two trunks"])
def test_first_actions_fit_their_ranges(std_kwargs):
    """Each has a mean and a standard deviation of its own; a range of nothing, or of everything, says nothing."""
    policy = make_policy(action_space=RANGES, **std_kwargs)
    first = normal(policy, th.zeros(1, 3))
    np.testing.assert_allclose(first.mean[0].detach(), [0, 75, 0, 0, 0])
    np.testing.assert_allclose(first.stddev[0].detach(), [0.4, 10, 1, 1, 1], rtol=1e-5)
    mean = normal(make_policy(action_space=RANGES, log_std_init=-2.0, **std_kwargs), th.zeros(1, 3)).mean
    np.testing.assert_allclose(mean[0].detach(), [0, 75, 0, 0, 0])
    loaded = MlpPolicy(**{**policy._get_constructor_parameters(), "lr_schedule": lambda _: 1e-2})
    np.testing.assert_array_equal(normal(loaded, th.zeros(1, 3)).stddev.detach(), first.stddev.detach())


@both_heads
def test_min_std(std_kwargs):
    policy = make_policy(min_std=0.1, **std_kwargs)
    th.nn.init.normal_(policy.std_net.weight, std=100)
    obs = th.cat([observations(scale=scale) for scale in (1e-30, 1.0, 1e3, 1e30)])
    stddev = normal(policy, obs).stddev
    np.testing.assert_allclose(stddev.min().item(), 0.1, rtol=1e-6)
    assert stddev.max() > 100
    assert policy.evaluate_actions(obs, th.zeros(len(obs), 2))[1].isfinite().all()


def test_default_min_std_keeps_the_gradient_finite():
    policy = make_policy(**SHARED_TRUNK)
    th.nn.init.constant_(policy.std_net.bias, -1e4)
    distribution = policy.get_distribution(observations())
    np.testing.assert_allclose(distribution.distribution.stddev.detach(), 1e-6, rtol=1e-3)
    distribution.log_prob(distribution.sample().detach()).sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)


def trunks(policy):
    """The modules that only the mean, only the standard deviation and both depend on."""
    extractor = policy.mlp_extractor
    if policy.std_net_arch is None:
        return [policy.action_net], [policy.std_net], [extractor.policy_net]
    return [policy.action_net, extractor.policy_net], [policy.std_net, extractor.std_net], []


@both_heads
@pytest.mark.parametrize("output", ["mean", "stddev", "log_prob"])
def test_gradient_reaches_heads_and_trunks(std_kwargs, output):
    policy = make_policy(**std_kwargs)
    of_mean, of_std, of_both = trunks(policy)
    distribution = normal(policy, observations())
    (distribution.log_prob(th.ones(2)) if output == "log_prob" else getattr(distribution, output)).sum().backward()
    expected = {"mean": of_mean + of_both, "stddev": of_std + of_both, "log_prob": of_mean + of_std + of_both}[output]
    reached = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    parameters = {id(p) for module in expected for p in module.parameters()}
    assert reached == {name for name, p in policy.named_parameters() if id(p) in parameters}


def test_each_trunk_has_its_own_output():
    policy, obs = make_policy(**TWO_TRUNKS), observations()
    of_mean, of_std, _ = trunks(policy)
    before = normal(policy, obs)
    for module in of_std:
        module.apply(lambda m: [th.nn.init.normal_(p) for p in m.parameters(recurse=False)])
    after = normal(policy, obs)
    assert th.equal(after.mean, before.mean)
    assert (after.stddev != before.stddev).all()
    for module in of_mean:
        module.apply(lambda m: [th.nn.init.normal_(p) for p in m.parameters(recurse=False)])
    assert (normal(policy, obs).mean != after.mean).all()
    assert th.equal(normal(policy, obs).stddev, after.stddev)


@all_observations
@pytest.mark.parametrize("share_features_extractor", [False, True])
@pytest.mark.parametrize("std_kwargs", [{}, SHARED_TRUNK, TWO_TRUNKS], ids=["parameter", "shared trunk", "two trunks"])
def test_optimizer_holds_each_parameter_once(policy_class, space, share_features_extractor, std_kwargs):
    policy = make_policy(policy_class, space, share_features_extractor=share_features_extractor, **std_kwargs)
    held = [id(parameter) for group in policy.optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in policy.parameters()}


@both_heads
def test_no_log_std(std_kwargs):
    policy = make_policy(**std_kwargs)
    assert not hasattr(policy, "log_std")
    assert "log_std" not in policy.state_dict()
    assert hasattr(make_policy(), "log_std")


@both_heads
def test_log_prob_and_entropy(std_kwargs):
    policy = make_policy(**std_kwargs)
    th.nn.init.normal_(policy.std_net.weight)
    obs = observations()
    distribution = normal(policy, obs)
    mean, std = distribution.mean, distribution.stddev
    assert mean.shape == std.shape == (32, 2)
    actions = policy.get_distribution(obs).sample()
    _, log_prob, entropy = policy.evaluate_actions(obs, actions)
    th.testing.assert_close(log_prob, Normal(mean, std).log_prob(actions).sum(dim=1))
    th.testing.assert_close(entropy, Normal(mean, std).entropy().sum(dim=1))
    # In closed form
    th.testing.assert_close(log_prob, (-(((actions - mean) / std) ** 2) / 2 - std.log() - np.log(2 * np.pi) / 2).sum(dim=1))
    th.testing.assert_close(entropy, (std.log() + np.log(2 * np.pi * np.e) / 2).sum(dim=1))


@both_heads
def test_std_is_softplus_of_the_head(std_kwargs):
    policy, obs = make_policy(min_std=0.1, **std_kwargs), observations()
    trunk = policy.mlp_extractor.policy_net if policy.std_net_arch is None else policy.mlp_extractor.std_net
    th.testing.assert_close(normal(policy, obs).stddev, (1 + policy.std_net(trunk(obs)).exp()).log() + 0.1)
    th.testing.assert_close(normal(policy, obs).mean, policy.action_net(policy.mlp_extractor.policy_net(obs)))


@both_heads
def test_samples_have_the_std(std_kwargs):
    policy = make_policy(log_std_init=-1.0, **std_kwargs)
    actions = policy.get_distribution(th.zeros(1, 3).expand(20_000, 3)).sample()
    np.testing.assert_allclose(actions.std(dim=0).detach(), np.exp(-1), rtol=0.03)


@both_heads
def test_deterministic_action_is_the_mean(std_kwargs):
    policy, obs = make_policy(**std_kwargs), observations()
    actions, _ = policy.predict(obs.numpy(), deterministic=True)
    np.testing.assert_allclose(actions, normal(policy, obs).mean.detach(), rtol=1e-6)
    assert not np.allclose(policy.predict(obs.numpy())[0], actions)


def test_without_state_dependent_std_it_is_sb3s_policy():
    ours, sb3s = make_policy(log_std_init=0.0), make_policy(ActorCriticPolicy)
    assert_same(dict(ours.state_dict()), dict(sb3s.state_dict()))


def test_min_std_has_no_say_without_state_dependent_std():
    policy = make_policy(log_std_init=-20.0)
    np.testing.assert_allclose(normal(policy, observations()).stddev.detach(), np.exp(-20), rtol=1e-5)


@both_heads
def test_large_initial_std(std_kwargs):
    policy = make_policy(log_std_init=8.0, **std_kwargs)
    np.testing.assert_allclose(normal(policy, th.zeros(1, 3)).stddev.detach(), np.exp(8), rtol=1e-5)


@pytest.mark.parametrize(
    "action_space, use_sde",
    [(spaces.Discrete(2), False), (spaces.MultiDiscrete([2, 3]), False), (spaces.MultiBinary(2), False), (ACTION, True)],
    ids=str,
)
def test_state_dependent_std_is_refused(action_space, use_sde):
    with pytest.raises(ValueError, match=f"state_dependent_std=True needs a Box action space .*use_sde={use_sde}"):
        make_policy(action_space=action_space, use_sde=use_sde, **SHARED_TRUNK)


@all_observations
@pytest.mark.parametrize("share_features_extractor", [False, True])
@pytest.mark.parametrize("std_kwargs", [{}, SHARED_TRUNK, TWO_TRUNKS], ids=["parameter", "shared trunk", "two trunks"])
def test_save_load(tmp_path, policy_class, space, share_features_extractor, std_kwargs):
    kwargs = dict(log_std_init=-1.0, share_features_extractor=share_features_extractor, **std_kwargs)
    if std_kwargs:
        kwargs["min_std"] = 0.1
    policy = make_policy(policy_class, space, **kwargs)
    for parameter in policy.parameters():
        th.nn.init.normal_(parameter, std=0.1)
    policy.save(tmp_path / "policy")
    loaded = policy_class.load(tmp_path / "policy", device="cpu")
    assert type(loaded) is policy_class
    policy.set_training_mode(False)
    obs, _ = policy.obs_to_tensor(space.sample())
    for name in ("mean", "stddev"):
        assert th.equal(getattr(normal(loaded, obs), name), getattr(normal(policy, obs), name))
    assert th.equal(loaded.predict_values(obs), policy.predict_values(obs))


@all_observations
@both_heads
def test_learn(policy_class, space, std_kwargs):
    model = make_model(SpacesEnv(space, ACTION), policy_class, policy_kwargs=std_kwargs)
    before = clone(model)
    model.learn(1)
    names = changed(model, before)
    assert {"action_net.weight", "std_net.weight", "std_net.bias"} <= names
    assert not any(name.startswith(("value_net", "mlp_extractor.value_net")) for name in names)
    action, _ = model.predict(space.sample())
    assert ACTION.contains(action)


@pytest.mark.parametrize("policy", ["MlpPolicy", MlpPolicy, ActorCriticPolicy])
@pytest.mark.parametrize("baseline", ["timestep", "value"])
def test_policy_by_name_and_by_class(policy, baseline):
    model = make_model(policy=policy, baseline=baseline)
    assert type(model.policy) is (MlpPolicy if policy == "MlpPolicy" else policy)
    before = clone(model)
    model.learn(1)
    assert "action_net.weight" in changed(model, before)


@pytest.mark.parametrize("name, policy_class", [("CnnPolicy", CnnPolicy), ("MultiInputPolicy", MultiInputPolicy)])
def test_aliases(name, policy_class):
    env = SpacesEnv(IMAGE if name == "CnnPolicy" else DICT, ACTION)
    assert type(make_model(env, name).policy) is policy_class


@pytest.mark.parametrize("algorithm", [A2C, PPO])
@pytest.mark.parametrize("policy_kwargs", [{}, SHARED_TRUNK, TWO_TRUNKS], ids=["parameter", "shared trunk", "two trunks"])
def test_in_sb3s_algorithms(algorithm, policy_kwargs):
    kwargs = dict(batch_size=8, n_epochs=1) if algorithm is PPO else {}
    # A copy, as A2C adds its optimizer to it
    model = algorithm(MlpPolicy, CountEnv(), n_steps=8, policy_kwargs={**policy_kwargs}, seed=0, device="cpu", **kwargs)
    before = clone(model)
    model.learn(16)
    assert changed(model, before) == before.keys()


@pytest.mark.parametrize("share_features_extractor", [False, True])
@pytest.mark.parametrize(
    "kwargs, learners",
    [
        (dict(baseline="timestep"), {"actor"}),
        (dict(baseline="value"), {"actor", "critic"}),
        (dict(baseline="value", learning_rate=0.0), {"critic"}),
        (dict(baseline="value", value_learning_rate=0.0), {"actor"}),
    ],
    ids=["timestep", "value", "value, learning_rate=0", "value, value_learning_rate=0"],
)
@pytest.mark.parametrize("std_kwargs", [{}, TWO_TRUNKS], ids=["parameter", "two trunks"])
def test_who_learns(share_features_extractor, kwargs, learners, std_kwargs):
    """Actor and critic follow their own optimizers, and the features that both share follow the policy gradient."""
    policy_kwargs = dict(
        features_extractor_class=LinearExtractor, share_features_extractor=share_features_extractor, net_arch=[8], **std_kwargs
    )
    model = make_model(policy_kwargs=policy_kwargs, **kwargs)
    before = clone(model)
    model.learn(60)
    assert model._n_updates == 3
    parts = {"critic": critic_names(model), "actor": before.keys() - critic_names(model)}
    assert changed(model, before) == {name for learner in learners for name in parts[learner]}


@pytest.mark.parametrize("share_features_extractor", [False, True])
def test_fit_of_the_critic_has_no_say_in_the_policy_gradient(share_features_extractor):
    """Not even through the features that actor and critic share."""
    policy_kwargs = dict(features_extractor_class=LinearExtractor, share_features_extractor=share_features_extractor)
    few, many = (make_model(policy_kwargs=policy_kwargs, baseline="value", n_value_epochs=n).learn(1) for n in (1, 20))
    assert changed(few, clone(many)) == critic_names(few) != set()


@pytest.mark.parametrize(
    "space, kwargs, expected",
    [
        (spaces.Box(-1, 1, (2,)), {}, 0.4),
        (spaces.Box(-2, 6, (1,)), {}, 1.6),
        (spaces.Box(np.array([-1, 0], np.float32), np.array([1, 6], np.float32)), {}, [0.4, 1.2]),
        (spaces.Box(-1, 1, (2,)), dict(log_std_init=-1.5), np.exp(-1.5)),
        (spaces.Box(-1, 1, (2,)), SHARED_TRUNK, 0.4),
        (spaces.Box(-np.inf, np.inf, (2,)), {}, 1.0),
    ],
)
def test_initial_standard_deviation(space, kwargs, expected, tmp_path):
    """Unless it is given, it is 0.4 times half the range of each action, and comes back with the policy."""
    policy = make_policy(action_space=space, **kwargs)
    policy.save(tmp_path / "policy")
    for one in (policy, MlpPolicy.load(tmp_path / "policy")):
        std = normal(one, th.zeros(1, 3)).stddev
        np.testing.assert_allclose(std.detach().numpy(), np.broadcast_to(expected, (1, *space.shape)), rtol=0.05)


def test_initial_noise_of_gsde():
    assert not make_policy(use_sde=True).log_std.any()


@pytest.mark.parametrize(
    "policy_kwargs, expected",
    [
        ({}, (0.9, 0.999)),
        (dict(optimizer_kwargs=dict(betas=(0.3, 0.99))), (0.3, 0.99)),
        (dict(optimizer_class=th.optim.AdamW), (0.9, 0.999)),
    ],
)
def test_momentum_of_the_critic(policy_kwargs, expected):
    model = make_model(policy_kwargs=policy_kwargs, baseline="value")
    assert model.value_optimizer.param_groups[0]["betas"] == expected
