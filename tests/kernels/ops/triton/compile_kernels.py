"""Compiles every kernel for a GPU, without one. A program of its own, because the tests interpret kernels."""

import itertools
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlhfkernels.ops.triton import launch, rms_norm, rotary, swiglu, token_logprobs

# Arguments other than pointers to elements of the case's dtype.
TYPES = {
    "inverse_ptr": "*fp32",
    "sums_ptr": "*fp32",
    "targets_ptr": "*i64",
    "logprobs_ptr": "*fp32",
    "entropies_ptr": "*fp32",
    "logprob_weights_ptr": "*fp32",
    "entropy_weights_ptr": "*fp32",
    **dict.fromkeys(("eps", "direction", "scale", "softcap", "inverse_temperature"), "fp32"),
    **dict.fromkeys(("n", "d", "rows_per_group", "size", "row_stride", "table_rows", "pairs", "v"), "i32"),
}
FLAGS = [True, False]
KERNELS = [
    (rms_norm._forward_kernel, {"block": [64, 8192]}),
    (rms_norm._backward_kernel, {"with_x": FLAGS, "with_weight": FLAGS, "block": [1024]}),
    (swiglu._forward_kernel, {"block": [1024]}),
    (swiglu._backward_kernel, {"block": [1024]}),
    (rotary._rotate_kernel, {"groups": [15], "rotated": [12], "head_size": [64], "half": [32], "block": [512]}),
    (
        token_logprobs._kernel,
        {"capped": FLAGS, "with_entropy": FLAGS, "with_gradient": [True], "with_weights": FLAGS, "block": [4096]},
    ),
]
# Triton specializes on an integer argument that is 1.
OFTEN_ONE = ("rows_per_group", "table_rows")


def compile_kernel(kernel, constants, dtype, capability):
    signature = {name: "constexpr" if name in constants else TYPES.get(name, f"*{dtype}") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    found = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=launch.compile_options(constants["block"])
    )
    assert found.asm["cubin"]


def main(dtype, capability):
    num_kernels = 0
    for kernel, choices in KERNELS:
        for values in itertools.product(*choices.values()):
            constants = dict(zip(choices, values, strict=True))
            compile_kernel(kernel, constants, dtype, capability)
            num_kernels += 1
        for name in OFTEN_ONE:
            if name in kernel.arg_names:
                compile_kernel(kernel, {**constants, name: 1}, dtype, capability)
    print(num_kernels)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
