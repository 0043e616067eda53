"""The harness: what to run, running it, measuring it, keeping it, judging it."""
