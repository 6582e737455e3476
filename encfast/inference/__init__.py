"""Encoders compiled for inference: weights packed once, few large ops, no autograd.

    fast = compile_encoder(model, dtype=torch.bfloat16)
    rows = fast(tokens)  # what model.hidden(tokens) returns
    vectors = fast.encode(tokens)  # what model.encode(tokens) returns

A block is five ops: :func:`encfast.ops.packed_linear` four times, with bias, activation or gate,
residual and, where the block is post-norm, the norm in its epilogue, and
:func:`encfast.ops.varlen_attn`. A pre-norm block has its two norms besides, one with rotary
positions the rotation.
"""

from encfast.inference.compiled import CompiledEncoder, compile_encoder

__all__ = ["CompiledEncoder", "compile_encoder"]
