"""What a model does while it draws: taps on its modules, and what is made with them.

In the order to read them: taps; sketches, traces and verifying (the whole way on file, and taken again).
"""

from .taps import Tapped, Value, tap
from .traces import trace
from .verifying import verify

__all__ = ["Tapped", "Value", "tap", "trace", "verify"]
