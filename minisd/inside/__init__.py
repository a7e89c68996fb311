"""What a model does while it draws: taps on its modules, and what is made with them.

In the order to read them: taps; sketches, traces and verifying (the whole way on file, and taken again); fused, sides and layers
(two ways to compute, layer by layer); maps (where the pixels look in the prompt); shown/ (how a person sees it).
"""

from .layers import numerics
from .maps import Attention, attention
from .sides import side
from .taps import Tapped, Value, tap
from .traces import trace
from .verifying import verify

__all__ = ["Attention", "Tapped", "Value", "attention", "numerics", "side", "tap", "trace", "verify"]
