"""Task vectors: their algebra in the tangent space and in weight space, products with the Jacobian, and `solve`.

The package imports weight space: `TaskVector.open` and `cast` give its vectors, whatever else was imported.
"""

from linlora.vectors import weight_vector as weight_vector
