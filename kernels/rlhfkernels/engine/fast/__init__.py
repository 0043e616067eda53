"""The fast trunk: known architectures as a loop over their matmuls, without transformers' modules around them."""
