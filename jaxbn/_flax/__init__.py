"""Code shared by the linen and nnx modules."""
