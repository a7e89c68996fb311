"""Samplers, each a short generator in the file of its kind.  `registry` names them; what follows is all that others need."""

from .registry import SAMPLERS, Sampler, named, sample

__all__ = ["SAMPLERS", "Sampler", "named", "sample"]
