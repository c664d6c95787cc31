"""Data-parallel training with PyTorch's ``torchrun``."""
