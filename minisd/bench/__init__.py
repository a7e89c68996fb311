"""`minisd bench`: how fast the kernels, the networks and the whole way are on this machine, each beside a peer in the same run.

No download: weights are random, the architectures are the published ones.  Machines are noisy: read the ratios.
"""
