"""Networks from names and shapes.  Read shapes, ops, layers, family, clip, unet, vae; then taesd and blocks.

Nothing here knows of files, devices or fast paths: with diffusion/ and errors.py it can be copied out and used alone.
"""
