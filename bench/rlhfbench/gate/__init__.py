"""The regression gate: whether a change made a step slower or larger, and how sure that is."""
