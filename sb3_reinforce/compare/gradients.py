"""
The command ``gradients``: how good gradient estimates of a policy are, for every return, every baseline and several numbers of
episodes, all on the same episodes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from gymnasium.spaces import Dict
from rl_zoo3.utils import create_test_env, get_saved_hyperparams
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_reinforce.checks import check_choice, check_number
from sb3_reinforce.compare.contenders import check_env
from sb3_reinforce.compare.plots import plot_gradients
from sb3_reinforce.compare.quality import COLUMNS, ESTIMATORS, Estimator, collect, copy_of, fit_critic, measure, table_lines
from sb3_reinforce.compare.shared_starts import compare_groups, describe, start_share
from sb3_reinforce.reinforce import REINFORCE
from sb3_reinforce.vec_env.shared_starts import check_starts, share_starts

#: Numbers of episodes per estimate
BATCH_SIZES = (2, 4, 8, 16, 32)

#: What the report says of its columns
EXPLANATION = """\
variance: trace of the covariance between batches. SNR: squared norm of the expectation over that variance (blank: no signal
can be told from the noise). cosine: between two independent batches. noise scale: number of episodes at which the SNR is 1.
The estimates are those of the formula: normalize_advantage, reduction and gae_lambda of the model are left out. If the model
bootstraps at time limits, the returns of all baselines do."""


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
    env_kwargs = hyperparams.pop("env_kwargs", None)
    if folder and Path(folder, "args.yml").is_file():  # Those of the command line take the place of the entry's
        env_kwargs = yaml.load(Path(folder, "args.yml").read_text(), yaml.UnsafeLoader).get("env_kwargs") or env_kwargs
    env = create_test_env(
        env_id, 1, stats_path, seed, should_render=False, hyperparams=hyperparams, env_kwargs=env_kwargs or {}
    )
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
    if group_size > 1:  # Before any work is lost
        share_starts(measured.env)  # type: ignore[arg-type]
        check_starts(measured.env)  # type: ignore[arg-type]
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
        groups = compare_groups(measured, n_episodes, batch_sizes, group_size)
        text += "\n" + describe(start_share(measured), groups, group_size)
    (out / "gradients.md").write_text(text)
    plot_gradients(table if estimators else table[table["returns"] == "reward_to_go"], out, name)
    return table
