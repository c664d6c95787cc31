"""Notice that a training has stopped learning. Knows no SB3 algorithm, no logger and no environment."""

import math
import warnings
from collections import Counter
from collections.abc import Mapping

#: Updates in a row after which there is a warning
PATIENCE = 10

#: Returns that differ by less than this share of the largest one are equal
TOLERANCE = 1e-6

#: Share of the first standard deviation below which continuous actions are deterministic
MIN_STD = 1e-3

#: What is wrong, and what can be done about it
WARNINGS = {
    "equal": "All episodes of the first {patience} updates had the same return, {return_mean:g}: there is nothing to learn "
    "from. If rewards are rare, explore more (a larger ent_coef; for continuous actions use_sde=True or a larger "
    "log_std_init in policy_kwargs), take more episodes per update, or give a reward on the way",
    "deterministic": "The policy has become deterministic: it has tried nothing else for {patience} updates, and does not "
    "learn any more (mean return {return_mean:g}, best update before {best:g}). If this is not the solution, start again "
    "with a smaller target_kl, more steps per update (target_steps, n_episodes), or an ent_coef above 0",
    "no gradient": "The gradient has been exactly zero for {patience} updates: all returns of a batch are the same (mean "
    "return {return_mean:g}, best update before {best:g}). If this is not the solution, start again with a smaller "
    "target_kl, more steps per update (target_steps, n_episodes), or more exploration",
    "baseline": "The baseline predicts the returns worse than a constant would: its explained variance has been below -1 "
    "for {patience} updates (now {explained_variance:.2g}), which adds noise to the gradient. With baseline='value', try "
    "another value_learning_rate, more n_value_epochs or normalize_value=True; 'leave_one_out' needs no fit",
    "no step": "No step has been made for {patience} updates: every one that was tried, down to a millionth, changed the "
    "policy by more than twice target_kl. Try a larger target_kl, or look for a standard deviation near zero",
}


class Watch:
    """Look at what updates log, and warn once of each sign that they do not learn."""

    def __init__(self) -> None:
        self._in_a_row: Counter[str] = Counter()
        self._warned: set[str] = set()
        self._best = -math.inf
        self._have_differed = False
        self._first_std: float | None = None

    def look(self, metrics: Mapping[str, float], n_steps: int, is_discrete: bool) -> None:
        """
        Look at one update.

        :param metrics: What is logged of it: ``return_mean``, ``return_std``, ``explained_variance``, ``entropy_loss``,
            ``grad_norm``, ``is_line_search_success``, ``std`` of continuous actions
        :param n_steps: Number of steps of the batch
        :param is_discrete: Whether there is a finite number of actions
        """
        mean, std = metrics["return_mean"], metrics["return_std"]
        differ = std > TOLERANCE * abs(mean)
        self._have_differed |= differ
        could_be_better = differ or mean < self._best - TOLERANCE * abs(mean)
        if self._first_std is None:
            self._first_std = metrics.get("std", 0.0)
        # As improbable as a single other action in the whole batch
        is_deterministic = is_discrete and -metrics["entropy_loss"] * n_steps < 1
        is_deterministic |= metrics.get("std", math.inf) < MIN_STD * self._first_std
        has_no_gradient = metrics["grad_norm"] == 0
        signs = {
            "equal": not self._have_differed,
            "deterministic": is_deterministic and could_be_better,
            "no gradient": has_no_gradient and self._have_differed and could_be_better and not is_deterministic,
            # Returns that are almost the same leave nothing to explain
            "baseline": metrics.get("explained_variance", 0.0) < -1 and std > 0.01 * abs(mean),
            "no step": metrics.get("is_line_search_success") == 0,
        }
        for name, is_seen in signs.items():
            self._in_a_row[name] = self._in_a_row[name] + 1 if is_seen else 0
            if self._in_a_row[name] == PATIENCE and name not in self._warned:
                self._warned.add(name)
                warnings.warn(WARNINGS[name].format(patience=PATIENCE, best=self._best, **metrics))
        self._best = max(self._best, mean)
