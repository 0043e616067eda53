"""One training step of any method, its optimizers and its work."""
