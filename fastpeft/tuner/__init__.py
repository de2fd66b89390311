"""Putting adapters into a model and taking them out again."""

from fastpeft.tuner.injection import Injection
from fastpeft.tuner.merging import Tuner

__all__ = ["Injection", "Tuner"]
