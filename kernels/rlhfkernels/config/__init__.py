"""The definition of a case: its size, its options by group, and the named settings. Imports no torch."""
