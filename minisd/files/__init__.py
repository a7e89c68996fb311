"""Checkpoints on disk, whose contents are believed only once they are checked.

Read checkpoint (with entry and ckpt/: headers), writers and writers_table (what programs do to names), recognition (what a set of
keys is), training (how it was trained), tensors and upload (weights), model (the networks with the file's keys), saving.
"""
