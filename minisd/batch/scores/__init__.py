"""What a batch has drawn, in numbers: table reads pictures and recipes, judge looks at those of the tiny world.py."""

from .table import Score, scored

__all__ = ["Score", "scored"]
