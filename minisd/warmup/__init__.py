"""Kernels compiled before they are needed: by `minisd warm`, or while a checkpoint is loaded, with a GPU or without one.

    networks    the networks as a GPU runs them, called once on the meta device: shapes, no data
    absent      Triton for a GPU that need not be there; which variants of the kernels are launched
    worker      a process of its own, in which the variants of some networks are compiled, several at a time
    starting    from here: starts that process, reads what it says, remembers what is compiled

Nothing here is needed to draw: what is not compiled before is compiled at its first launch.
"""
