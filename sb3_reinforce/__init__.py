"""REINFORCE for Stable-Baselines3."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sb3_reinforce.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
    from sb3_reinforce.reinforce import REINFORCE

__version__ = "0.1.0"

__all__ = ["REINFORCE", "CnnPolicy", "MlpPolicy", "MultiInputPolicy", "__version__"]


def __getattr__(name: str) -> Any:
    # Imported on first use (PEP 562): the command line answers --help before PyTorch is loaded
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("sb3_reinforce.reinforce" if name == "REINFORCE" else "sb3_reinforce.policies"), name)


def __dir__() -> list[str]:
    return __all__
