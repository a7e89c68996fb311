"""Experiments beside the benchmarks of speed.

Read analytic (scores that are known exactly), samplers (their order), accuracy (what number formats and shortcuts cost); runtimes is
what others convert the networks to.
"""
