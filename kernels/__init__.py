from . import group_norm
KERNELS = {m.__name__.rsplit(".",1)[-1]: m for m in (group_norm,)}
