"""Whether environments still are at the starts of episodes where they were left."""

from typing import Any

from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_reinforce.vec_env.gymnasium import GymnasiumVecEnv


def mark_starts(env: VecEnv) -> list[Any] | None:
    """
    Mark the starts of episodes that a vectorized environment shows now.

    :param env: A vectorized environment that a reset or a step has just put at the start of an episode everywhere
    :return: Objects that the next reset or step will replace; ``None`` where they are out of reach
    """
    base = env.unwrapped
    if not isinstance(base, DummyVecEnv | SubprocVecEnv | GymnasiumVecEnv):
        return None
    # Most keep the actions of its last step, SubprocVecEnv gets new infos with each step
    return [*base.reset_infos, getattr(base, "actions", None)]


def is_at(env: VecEnv, mark: list[Any] | None) -> bool:
    """
    Tell whether nobody has reset, stepped or seeded the environments since.

    :param env: A vectorized environment
    :param mark: Result of :func:`mark_starts`
    :return: Whether they still are where they were; ``False`` if that is out of reach
    """
    now = mark_starts(env)
    if mark is None or now is None or len(mark) != len(now):
        return False
    base = env.unwrapped
    is_asked_for = any(seed is not None for seed in base._seeds) or any(base._options)
    return not is_asked_for and all(one is other for one, other in zip(mark, now, strict=True))
