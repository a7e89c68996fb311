"""The same numbers sooner: fused networks, recorded steps, decoding in bands where memory is short."""
