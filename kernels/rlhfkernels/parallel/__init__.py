"""One step over several processes: the world of ranks, and how torch and DeepSpeed divide a step among them."""
