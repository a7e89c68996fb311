"""The models that lie on this machine: where they are looked for, their names, how one is imported."""
