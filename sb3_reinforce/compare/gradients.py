"""
The quality of gradient estimates: how much of them is signal, for every return, every baseline and several numbers of
episodes, all on the same episodes of one policy.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch as th
from gymnasium.spaces import Dict, flatdim
from rl_zoo3.utils import create_test_env, get_saved_hyperparams
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_reinforce.advantages import compute_advantages, weights
from sb3_reinforce.arguments import MAX_LINEAR_NUMBERS, OF_REWARD_TO_GO
from sb3_reinforce.baselines import BASELINES
from sb3_reinforce.batch import flat_observations
from sb3_reinforce.batch_policy import batch_policy, has_memory
from sb3_reinforce.checks import check_choice, check_number, to_schedule
from sb3_reinforce.compare.contenders import check_env
from sb3_reinforce.compare.plots import plot_gradients
from sb3_reinforce.natural_gradient import flatten
from sb3_reinforce.reinforce import REINFORCE
from sb3_reinforce.returns import RETURNS

#: A return and a baseline
Estimator = tuple[str, str | None]

#: All that go together: the baseline of each time step is made for the reward-to-go, and so is the critic
ESTIMATORS: tuple[Estimator, ...] = tuple(
    (returns, baseline)
    for returns in RETURNS
    for baseline in (None, *BASELINES, "value")
    if returns == "reward_to_go" or baseline not in OF_REWARD_TO_GO
)

#: Passes of a critic that is fitted here
N_VALUE_EPOCHS = 30

#: Numbers of episodes per estimate
BATCH_SIZES = (2, 4, 8, 16, 32)

#: What the report says of its columns
EXPLANATION = """\
variance: trace of the covariance between batches. SNR: squared norm of the expectation over that variance (blank: no signal
can be told from the noise). cosine: between two independent batches. noise scale: number of episodes at which the SNR is 1.
The estimates are those of the formula: normalize_advantage, reduction and gae_lambda of the model are left out. If the model
bootstraps at time limits, the returns of all baselines do."""

COLUMNS = ("returns", "baseline", "n_episodes", "n_batches", "variance", "snr", "cosine", "noise_scale")

#: Titles of columns in the report
TITLES = {
    "returns": "returns",
    "baseline": "baseline",
    "n_episodes": "episodes",
    "n_batches": "batches",
    "variance": "variance",
    "snr": "SNR",
    "cosine": "cosine",
    "noise_scale": "noise scale",
    "group_size": "group size",
}

#: How numbers are written in the report
FORMATS: dict[str, Callable[[Any], str]] = {
    "variance": "{:.3g}".format,
    "snr": "{:.3g}".format,
    "cosine": "{:.3f}".format,
    "noise_scale": "{:.1f}".format,
}


def collect(model: REINFORCE, n_episodes: int) -> None:
    """
    Fill the rollout buffer of a model, as training does.

    :param model: The model
    :param n_episodes: Number of episodes
    """
    model.n_episodes, model.target_steps = n_episodes, 0
    model.tensorboard_log, model.verbose = None, 0
    _, callback = model._setup_learn(1)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 0)  # type: ignore[arg-type]


def fit_critic(model: REINFORCE, n_episodes: int) -> None:
    """
    Fit the critic of a model to other episodes than those that the gradients are taken of.

    :param model: The model
    :param n_episodes: Number of episodes
    """
    collect(model, n_episodes)
    buffer = model.rollout_buffer
    buffer.targets = RETURNS["reward_to_go"](buffer.rewards, buffer.lengths, model.gamma).astype(np.float32)
    model.critic.fit(buffer, N_VALUE_EPOCHS, model.value_batch_size, to_schedule(model.value_learning_rate)(1.0))


def batch_gradients(model: REINFORCE, n_episodes: int, estimators: Sequence[Estimator] = ESTIMATORS) -> Iterator[np.ndarray]:
    """
    Compute the gradient estimates of independent batches of the episodes in the rollout buffer of a model.

    :param model: The model
    :param n_episodes: Number of episodes per batch, whole groups where starts are shared
    :param estimators: Returns and baselines
    :return: For each batch its gradients, shape ``(n_estimators, n_parameters)``, in double precision
    """
    buffer, critic = model.rollout_buffer, model.critic
    ends = np.cumsum(buffer.lengths)
    starts = ends - buffer.lengths
    chunks = buffer.chunks(2**13, has_memory(model.policy))
    values = critic.predict(chunks)
    last_values = critic.predict_last(buffer) if model.bootstraps else np.zeros(buffer.n_episodes)
    needs_features = any(baseline == "linear" for _, baseline in estimators)
    observations = flat_observations(chunks, model.observation_space) if needs_features else None
    of_critic = {id(parameter) for parameter in critic.parameters}
    parameters = [p for p in model.policy.parameters() if p.requires_grad and id(p) not in of_critic]

    # Group by group, which several environments have played
    order = np.argsort(buffer.groups, kind="stable")
    for first in range(0, buffer.n_episodes - n_episodes + 1, n_episodes):
        episodes = order[first : first + n_episodes]
        steps = np.concatenate([np.arange(starts[episode], ends[episode]) for episode in episodes])
        rewards, lengths = buffer.rewards[steps], buffer.lengths[episodes]
        groups = buffer.groups[episodes] - buffer.groups[episodes[0]]
        factors = []
        for returns, baseline in estimators:
            estimate = compute_advantages(
                rewards,
                lengths,
                model.gamma,
                returns,
                baseline,
                values[steps],
                last_values[episodes],
                observations=observations[steps] if observations is not None and baseline == "linear" else None,
                groups=groups,
                n_groups=groups.max() + 1,
            )
            factors.append(weights(estimate, lengths, len(rewards), discount=model.gamma if model.discount_states else 1.0))
        batch = buffer._get_samples(steps)
        log_prob = batch_policy(model.policy).distribution(batch).log_prob(batch.actions)  # type: ignore[arg-type]
        gradients = [
            flatten(th.autograd.grad(log_prob, parameters, w, retain_graph=True, allow_unused=True, materialize_grads=True))
            for w in th.as_tensor(np.stack(factors)).to(log_prob)
        ]
        yield th.stack(gradients).double().cpu().numpy() / n_episodes


def quality(gradients: Iterable[np.ndarray], n_episodes: int) -> dict[str, np.ndarray]:
    """
    Measure the quality of gradient estimates. With ``g_b`` the gradients of ``B`` independent batches of ``n`` episodes,
    ``G`` their expectation:

    * ``variance``: trace of the covariance of ``g_b``, the mean squared distance from ``G``
    * ``snr``: ``|G|^2 / variance``, with the unbiased estimate ``|mean g_b|^2 - variance / B`` of ``|G|^2``; NaN where
      that is not positive, as no signal can be told from the noise
    * ``cosine``: mean cosine between two different batches; a gradient of zero has none with any other
    * ``noise_scale``: ``n variance / |G|^2``, the number of episodes at which signal and noise are equal (McCandlish et
      al., An empirical model of large-batch training, https://arxiv.org/abs/1812.06162, eq. 2.9)

    :param gradients: Gradients of the batches, each of shape ``(n_estimators, n_parameters)``, two batches or more
    :param n_episodes: Number of episodes per batch
    :return: These numbers, each of shape ``(n_estimators,)``, and ``n_batches``
    """
    n_batches = 0
    total: Any = 0.0
    squares: Any = 0.0
    directions: Any = 0.0
    same: Any = 0.0
    # One after the other, as all at once would take memory for every batch
    for gradient in gradients:
        n_batches += 1
        square = (gradient**2).sum(axis=1)
        direction = gradient / np.sqrt(np.where(square > 0, square, 1))[:, None]
        total, squares = total + gradient, squares + square
        directions, same = directions + direction, same + (direction**2).sum(axis=1)
    square_of_mean = (total**2).sum(axis=1) / n_batches**2
    variance = np.maximum(squares - n_batches * square_of_mean, 0) / (n_batches - 1)
    signal = square_of_mean - variance / n_batches
    with np.errstate(divide="ignore", invalid="ignore"):
        snr = np.where(signal > 0, signal / variance, np.nan)
    cosine = ((directions**2).sum(axis=1) - same) / (n_batches * (n_batches - 1))
    return {
        "n_batches": np.full(len(snr), n_batches),
        "variance": variance,
        "snr": snr,
        "cosine": cosine,
        "noise_scale": n_episodes / snr,
    }


def measure(model: REINFORCE, batch_sizes: Sequence[int], estimators: Sequence[Estimator] = ESTIMATORS) -> pd.DataFrame:
    """
    Measure the quality of estimators on the episodes in the rollout buffer of a model.

    :param model: A model with episodes in its rollout buffer
    :param batch_sizes: Numbers of episodes per batch
    :param estimators: Returns and baselines; ``"linear"`` is left out where observations are too large for it
    :return: One row per estimator and number of episodes, with the columns :data:`COLUMNS`
    """
    is_narrow = flatdim(model.observation_space) <= MAX_LINEAR_NUMBERS
    estimators = [(returns, baseline) for returns, baseline in estimators if is_narrow or baseline != "linear"]
    names = pd.DataFrame([(returns, baseline or "none") for returns, baseline in estimators], columns=list(COLUMNS[:2]))
    tables = [names.assign(n_episodes=n, **quality(batch_gradients(model, n, estimators), n)) for n in batch_sizes]
    return pd.concat(tables).sort_values(["returns", "baseline", "n_episodes"], kind="stable")[list(COLUMNS)]


def make_env(model_path: Path | None, env_id: str, seed: int) -> VecEnv:
    """
    Make the environment of a model.

    :param model_path: Model in a log folder of RL Zoo, whose wrappers and normalization are used, or elsewhere
    :param env_id: Id of an environment
    :param seed: Seed
    :return: The environment
    """
    folder = "" if model_path is None else str(model_path.parent / env_id.replace("/", "-"))
    hyperparams, stats_path = get_saved_hyperparams(folder, norm_reward=True)
    env = create_test_env(env_id, 1, stats_path, seed, should_render=False, hyperparams=hyperparams)
    normalizer = unwrap_vec_normalize(env)
    if normalizer is not None:  # The critic was trained on these rewards
        normalizer.norm_reward = hyperparams.get("normalize_kwargs", {}).get("norm_reward", True)
    return env


def make_model(model_path: Path | None, env_id: str, seed: int) -> REINFORCE:
    """
    Load a model, or make a fresh one.

    :param model_path: A saved ``REINFORCE``; ``None``: a fresh one
    :param env_id: Id of the environment
    :param seed: Seed
    :return: The model, with its environment
    """
    env = make_env(model_path, env_id, seed)
    if model_path is None:
        space = env.observation_space
        is_image = is_image_space(space)
        policy = "MultiInputPolicy" if isinstance(space, Dict) else "CnnPolicy" if is_image else "MlpPolicy"
        return REINFORCE(policy, env, seed=seed)
    return REINFORCE.load(model_path, env=env, seed=seed)


def copy_of(model: REINFORCE, **changes: Any) -> REINFORCE:
    """
    Copy a model.

    :param model: A model with an environment, which the copy uses too
    :param changes: Arguments of the constructor that differ
    :return: The copy
    """
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    return REINFORCE.load(file, env=model.get_env(), device=model.device, **changes)


def table_lines(table: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    """
    Write a table of the report.

    :param table: Rows, as :func:`measure` gives them
    :param columns: Columns to write
    :return: Lines of Markdown
    """
    lines = [f"| {' | '.join(TITLES[key] for key in columns)} |", "|---" * len(columns) + "|"]
    for row in table.to_dict("records"):
        cells = ["" if pd.isna(row[key]) else FORMATS.get(key, str)(row[key]) for key in columns]
        lines.append(" ".join(f"| {' | '.join(cells)} |".split()))
    return lines


def report(table: pd.DataFrame, title: str) -> str:
    """
    Write the report.

    :param table: Result of :func:`measure`
    :param title: First lines
    :return: The report, in Markdown
    """
    lines = [title, "", *table_lines(table, COLUMNS), ""]
    unbiased = table[(table["returns"] != "mean_reward_to_go") & (table["baseline"] != "mean") & np.isfinite(table["snr"])]
    for n_episodes, group in unbiased.groupby("n_episodes"):
        best = group.iloc[group["snr"].argmax()]
        lines.append(
            f"* {n_episodes} episodes: the highest signal-to-noise ratio without bias is that of {best['returns']} with "
            f"baseline {best['baseline']}, {best['snr']:.3g} (from {best['n_batches']} batches: small differences are chance)"
        )
    return "\n".join(lines) + "\n"


def gradients(
    out: Path | str,
    model: REINFORCE | Path | str | None = None,
    env_id: str | None = None,
    n_episodes: int = 256,
    batch_sizes: Sequence[int] | None = None,
    seed: int = 0,
    command: str = "",
    estimators: Sequence[Estimator] | None = None,
    group_size: int = 1,
) -> pd.DataFrame:
    """
    Measure how good gradient estimates of a policy are, and write ``gradients.csv``, ``gradients.md`` and a picture.

    The critic is the model's own where it has learned one, or else fitted to as many other episodes.

    :param out: Folder to write to
    :param model: A model with an environment, or the path of a saved one; ``None``: a fresh one. The model is left as it is;
        its environment plays, which moves its generators and the running statistics of a ``VecNormalize`` that is training
    :param env_id: Id of the environment; ``None``: the name of the model's file
    :param n_episodes: Number of episodes
    :param batch_sizes: Numbers of episodes per gradient estimate; ``None``: 2, 4, 8, 16 and 32, as far as they are at most
        half of ``n_episodes``
    :param seed: Seed
    :param command: The command that asked for this, for the report
    :param estimators: Returns and baselines, of :data:`ESTIMATORS`. ``None``: all, of which the picture shows those of the
        reward-to-go
    :param group_size: Where it is above 1, the report says too what groups of so many episodes with a shared start are worth
    :return: What was measured
    :raises ValueError: If an argument cannot be
    """
    out, given = Path(out), model if isinstance(model, REINFORCE) else None
    model_path = None if model is None or given is not None else Path(model)  # type: ignore[arg-type]
    if model_path is not None and not (model_path.suffix == ".zip" and model_path.is_file()):
        raise ValueError(f"--model {model_path} must be the path of a .zip file")
    if given is not None and given.env is None:
        raise ValueError("The model has no environment: give it one with set_env")
    if env_id is None and model is None:
        raise ValueError("--model or --env is required")
    name = env_id or ("the environment of the model" if model_path is None else model_path.stem)
    if given is None:
        check_env(name)
    check_number("n_episodes", n_episodes, 4, integer=True)
    batch_sizes = batch_sizes or [size for size in BATCH_SIZES if size <= n_episodes // 2]
    for size in batch_sizes:
        check_number("batch_sizes", size, 2, n_episodes // 2, integer=True)
    check_number("group_size", group_size, 1, n_episodes // 2, integer=True)
    for estimator in estimators or ():
        check_choice("estimator", estimator, ESTIMATORS)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} must be a folder, or a path where one can be made")
    if group_size > 1 and not any(size % group_size == 0 for size in batch_sizes):
        raise ValueError(f"group_size={group_size}: one of batch_sizes={list(batch_sizes)} must be a multiple of it")
    measured = make_model(model_path, name, seed) if given is None else given
    if measured.time_limit == "discard":
        raise ValueError("time_limit='discard' leaves out episodes: the numbers per batch would not be those asked for")
    if measured.group_options is not None and group_size > 1:
        raise ValueError("group_options: episodes without groups would have other starts than those with them")
    baseline = "leave_one_out" if measured.baseline == "greedy" else measured.baseline
    measured = copy_of(measured, group_size=1, group_options=None, baseline=baseline)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} must be a folder, or a path where one can be made: {error}") from error
    has_critic = measured.baseline == "value" and measured._n_updates > 0
    if not has_critic:
        fit_critic(measured, n_episodes)
    collect(measured, n_episodes)
    table = measure(measured, batch_sizes, estimators or ESTIMATORS)
    table.to_csv(out / "gradients.csv", index=False, float_format="%.6g")
    lengths = measured.rollout_buffer.lengths
    subject = "a fresh policy" if model is None else "a model" if model_path is None else model_path.name
    title = f"""# Gradient estimates of {subject} in {name}

```
{command or "sb3_reinforce.compare.gradients.gradients"}
```

{n_episodes} episodes of {lengths.mean():.1f} steps on average, gamma {measured.gamma:g}, seed {measured.seed}.

{EXPLANATION}
value: {"the critic of the model" if has_critic else f"a critic fitted to {n_episodes} other episodes before"}."""
    text = report(table, title)
    if group_size > 1:
        from sb3_reinforce.compare.shared_starts import compare_groups, describe, start_share

        groups = compare_groups(measured, n_episodes, batch_sizes, group_size)
        text += "\n" + describe(start_share(measured), groups, group_size)
    (out / "gradients.md").write_text(text)
    plot_gradients(table if estimators else table[table["returns"] == "reward_to_go"], out, name)
    return table
