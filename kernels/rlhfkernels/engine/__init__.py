"""The engine: bases, adapters and heads of a case, forward passes and decoding."""
