"""The error of the streams."""


class TangentError(RuntimeError):
    """The tangent of a function cannot be formed; the message names the module, the function and the remedy."""
