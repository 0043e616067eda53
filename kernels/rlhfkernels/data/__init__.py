"""Training data: JSONL files, random tokens, and the batches that a step reads."""
