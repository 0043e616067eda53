"""The Triton form of an op, in the file of its name; imported where it is first run, as the package may be absent.

Every kernel computes in float32 and rounds where its op's reference rounds, or less often. Kernels run compiled on a
CUDA device, and as they stand in Triton's interpreter (``TRITON_INTERPRET=1``) on processor tensors.
"""
