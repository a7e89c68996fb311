from . import attention, geglu, group_norm, layer_norm, linear_geglu

KERNELS = {m.__name__.rsplit(".", 1)[-1]: m for m in (group_norm, layer_norm, geglu, linear_geglu, attention)}
