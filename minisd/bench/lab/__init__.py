"""Experiments beside the benchmarks of speed.

Read analytic (scores that are known exactly), samplers (their order), accuracy (what number formats and shortcuts cost) and
runtimes (what others convert the networks to).
"""
