"""Triton kernels, one file per op under the op's name, each with its launchers.

A launcher has the name and the arguments of its dispatcher op and trusts them: checks and the
choice of a backend happen in `encfast.ops`. Files here import only torch, triton and each other,
and are imported when an op first meets a GPU tensor, never by `import encfast`.
"""
