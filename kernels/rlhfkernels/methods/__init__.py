"""The methods as data, and what is derived from them. Imports no torch."""
