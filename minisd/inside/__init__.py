"""What a model does while it draws: taps on its modules, and what is made with them.

In the order to read them: taps.
"""

from .taps import Tapped, Value, tap

__all__ = ["Tapped", "Value", "tap"]
