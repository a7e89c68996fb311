"""minisd's Triton kernels, imported as `minisd.kernels`: one kernel a file, nothing in here knows minisd.

There are none yet: every operation of minisd/ops.py runs on PyTorch.
"""
