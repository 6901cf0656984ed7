"""Task vectors: their algebra in the tangent space and in weight space, products with the Jacobian, and `solve`."""
