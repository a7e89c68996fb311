"""Experiments beside the benchmarks of speed.

Read analytic (scores that are known exactly), then samplers (their order); runtimes (what others convert the networks to).
"""
