"""One file an op: its autograd Function, what it saves, its backward, written once for every backend.

Model scope's ops, which carry two streams, are in `dual`; the `torch` backend they all run on everywhere, in `aten`.
"""
