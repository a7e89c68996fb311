"""The fused networks as a CPU likes them.

Read operations (products, convolutions and what is added to them), packing (weights that stay in oneDNN's order), networks (the
layers of the UNet and of the VAE's decoder by these), attention and compiled (by products, or by code of our own in attention.c),
engine (who draws with them).
"""
