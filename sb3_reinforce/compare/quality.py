"""The quality of gradient estimates: how much of them is signal, measured on the episodes in the rollout buffer of a model."""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch as th
from gymnasium.spaces import flatdim

from sb3_reinforce.advantages import compute_advantages, weights
from sb3_reinforce.arguments import MAX_LINEAR_NUMBERS, OF_REWARD_TO_GO
from sb3_reinforce.baselines import BASELINES
from sb3_reinforce.batch import flat_observations
from sb3_reinforce.batch_policy import batch_policy, has_memory
from sb3_reinforce.checks import to_schedule
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
