"""Many cases over many machines: placement by need, on the nodes of a Ray cluster."""
