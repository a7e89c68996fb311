"""Experiments beside the benchmarks of speed.  Read analytic (scores that are known exactly), then samplers (their order), then
accuracy (what number formats and shortcuts cost)."""
