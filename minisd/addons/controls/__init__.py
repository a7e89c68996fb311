"""ControlNets and their kin on top of a checkpoint.

In the order of reading: names (what a file is), files (opening it), preprocess (from a photograph to a hint), control (what a
user asks for), fitting (whether it was made for a UNet), acting (what it adds, and when).
"""

from .control import Control as Control
from .files import load_control as load_control
