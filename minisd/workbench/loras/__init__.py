"""Add-ons of the LoRA family as files: into a checkpoint, out of two, smaller, several as one, and what is wrong with one."""
