"""The ops under a training step: one file an op, with its reference and its torch backend, listed in ``ops.table``.

``ops.triton`` and ``ops.native`` hold the Triton and C backends, in files of the same names. Ops know tensors only:
nothing here imports configuration, models or methods. On CUDA, matmuls stay cuBLAS's and attention stays
``scaled_dot_product_attention``.
"""
