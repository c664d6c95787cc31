"""Training states and exact resume."""

from sb3_reinforce.resume.callback import TrainingStateCallback

__all__ = ["TrainingStateCallback"]
