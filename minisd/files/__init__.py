"""Checkpoints on disk, whose contents are believed only once they are checked.

Read checkpoint (with entry, torch_file, pickled: headers), recognition (what a set of keys is), tensors and upload (weights),
model (the networks with the file's keys), saving.
"""
