"""Memory predicted without a device: plans, accelerators, ZeRO, the largest batch."""
