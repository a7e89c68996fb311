"""Folders of diffusers, to and from single files, to the bit."""
