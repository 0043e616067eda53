"""What is measured: the models, the methods as role tables, one training step of each, and the ops under it."""
