"""What is measured about one case: time, memory, the machine."""
