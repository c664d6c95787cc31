"""Vectorized environments besides those of SB3."""

from sb3_reinforce.vec_env.envpool import EnvPoolVecEnv

__all__ = ["EnvPoolVecEnv"]
