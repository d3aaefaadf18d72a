"""Kernels of optimum-dsa, which finds the library in this folder by itself.

As a kernel of the Hub, `linear` and `dense_rows` are here too, with the arguments of `optimum_dsa.packed.ops`; where
they cannot serve they call the reference there, so that optimum-dsa has to be imported.
"""

from importlib.util import find_spec


if find_spec(f"{__name__}._ops"):  # which kernel-builder writes
    from ._ops import ops

    linear, dense_rows = ops.linear, ops.dense_rows
