"""Rows become pictures.  Read drawer (models, calls, files), together (which rows are drawn in one call), texts (what the text
encoders have said)."""

from .drawer import Drawer as Drawer
