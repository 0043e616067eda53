"""Triton kernels of ops, in the files of their names; imported when first run, as the package may be absent.

Kernels compute in float32 and round where the reference rounds, or less often. They run compiled on a CUDA device, and
in Triton's interpreter (``TRITON_INTERPRET=1``) on CPU tensors.
"""
