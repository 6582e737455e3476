"""encfast: ragged encoders, fast everywhere.

A batch travels from tokens to the loss as one packed tensor (:class:`PackedBatch`); every hot step
is one op (:mod:`encfast.ops`); thin modules (:mod:`encfast.layers`) compose the ops; one file per
published system (:mod:`encfast.models`) composes the modules.
"""

from encfast import _load as _load  # the compiled operators, before anything may call them
from encfast import ops
from encfast._version import __version__
from encfast.export import exportable
from encfast.packed import PackedBatch
from encfast.registry import create, describe, list_models

__all__ = ["PackedBatch", "__version__", "create", "describe", "exportable", "list_models", "ops"]
