"""Ops of decoding in C, for float32 on a processor: compiled on the machine that runs them, when first asked for.

A step of decoding is a few hundred small ops on the same memory as the step before. ``Tape`` writes them down once,
with their addresses, and a step replays them in one call; each op has a file of its own here.
"""
