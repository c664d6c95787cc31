"""Vectorized environments besides those of SB3."""

from sb3_reinforce.vec_env.envpool import EnvPoolVecEnv
from sb3_reinforce.vec_env.gymnasium import GymnasiumVecEnv

__all__ = ["EnvPoolVecEnv", "GymnasiumVecEnv"]
