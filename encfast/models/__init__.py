"""One published system per file; see :mod:`encfast.registry`."""
