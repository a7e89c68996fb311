"""Experiments beside the benchmarks of speed.

Read analytic (scores that are known exactly), samplers (their order), accuracy (what number formats and shortcuts cost), taps
(what they cost while there is none) and runtimes (what others convert the networks to).
"""
