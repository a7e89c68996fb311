"""minisd's Triton kernels, imported as `minisd.kernels`: one kernel a file, nothing in here knows minisd.

Each file is read from top to bottom: the mathematics and the memory traffic, the plain PyTorch `reference`, the kernel, the
wrapper (which checks its arguments and raises ValueError), and the shapes that Stable Diffusion really uses.  Importing works
without Triton and without a GPU; running does not.  Tests run them on the CPU, with TRITON_INTERPRET=1 set before Triton is
imported.

For tests and benchmarks every file of KERNELS keeps the same protocol, `name` being the file's and the wrapper's name:

    SHAPES                              real shapes, frozen dataclasses with a `label`
    make(shape, device, dtype)          keyword arguments with random values (torch.manual_seed)
    name(**arguments)                   runs the kernel; linear_step changes its arguments, and returns those it changed, and
                                        layer_norm adds an addend to x
    reference(**arguments)              the same in plain PyTorch, in the dtype of the arguments (float64 for a true value)
    library(**arguments)                name -> callable without arguments: the alternatives that PyTorch offers (a partial:
                                        those that run another kernel of ours)
    traffic(shape, element_size)        bytes that must move to and from memory
    flops(shape)                        floating-point operations
    DTYPES                              where they are not all three: the number formats that the kernel takes
    tiles(shape)                        where a choice is worth timing: the values that the wrapper's argument `tile` may take
"""

from . import add_bias as _add_bias
from . import attention as _attention
from . import attention_columns as _attention_columns
from . import dequantise as _dequantise
from . import geglu as _geglu
from . import group_norm as _group_norm
from . import layer_norm as _layer_norm
from . import linear_geglu as _linear_geglu
from . import linear_step as _linear_step
from . import quantise_rows as _quantise_rows
from . import upsample_conv as _upsample_conv
from . import wide_attention as _wide_attention

KERNELS = {
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "attention": _attention,
    "wide_attention": _wide_attention,
    "geglu": _geglu,
    "linear_geglu": _linear_geglu,
    "upsample_conv": _upsample_conv,
    "add_bias": _add_bias,
    "quantise_rows": _quantise_rows,
    "dequantise": _dequantise,
    "linear_step": _linear_step,
}

add_bias = _add_bias.add_bias
attention = _attention.attention
attention_columns = _attention_columns.attention_columns  # looks, and draws nothing: not among KERNELS, which are timed
call_table, prediction_coefficients = _linear_step.call_table, _linear_step.prediction_coefficients
dequantise = _dequantise.dequantise
geglu = _geglu.geglu
group_norm = _group_norm.group_norm
layer_norm = _layer_norm.layer_norm
linear_geglu = _linear_geglu.linear_geglu
linear_step = _linear_step.linear_step
phase_weights = _upsample_conv.phase_weights
quantise_rows = _quantise_rows.quantise_rows
upsample_conv = _upsample_conv.upsample_conv
wide_attention = _wide_attention.wide_attention
