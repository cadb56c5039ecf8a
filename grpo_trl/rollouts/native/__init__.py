"""The fast engine: each prompt is prefilled once, and its keys and values are read once for all rows of its group."""

from .engine import NativeEngine

__all__ = ["NativeEngine"]
