"""The fast path: known architectures run by their products, without the general modules around them."""
