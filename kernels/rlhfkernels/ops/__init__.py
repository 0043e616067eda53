"""The ops under the training step: one file an op, a plain reference beside every fast form.

What lies between the products has a Triton form too (``ops.triton``), which CUDA tensors take; the products themselves
stay the library's (cuBLAS) there, and attention stays ``scaled_dot_product_attention``. Nearly every op has a form in C
(``ops.native``) for float32 on a processor.
"""
