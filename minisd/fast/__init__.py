"""The same numbers sooner.  Importing this room fills models/ops.py's table of replacements.

Read choice and operations (which kernel computes what), unet and decoder (the fused networks), graphs (recordings), ways (what
a walk may take), cuda, cpu/ and engine (who walks), engines (which of them), tiling (decoding in bands where memory is short).
"""

from . import operations as operations
