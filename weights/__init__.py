"""The tiny trained checkpoint, shipped with the package; see README.md beside this file."""
