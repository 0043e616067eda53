"""Ops in C for float32 on the CPU, compiled on the machine that runs them when first used.

A file of C holds one op, and the Python file of its name calls it on torch's tensors. ``Program`` records the ops of a
decode step with the addresses of their operands; every step replays them in one call.
"""
