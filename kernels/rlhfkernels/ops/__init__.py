"""The ops under the training step: one file an op, a plain reference beside every fast form."""
