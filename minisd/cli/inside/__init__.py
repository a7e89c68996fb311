"""The commands that look inside: trace, verify, numerics, attend, explain, each a thin call of a function of minisd.inside."""
