"""Encoders compiled for inference: weights packed once, few large ops, no autograd.

    fast = compile_encoder(model, dtype=torch.bfloat16)
    rows = fast(tokens)  # what model.hidden(tokens) returns
    vectors = fast.encode(tokens)  # what model.encode(tokens) returns

A block is five ops: :func:`encfast.ops.packed_linear` four times, with bias, activation or gate,
residual and, where the block is post-norm, the norm in its epilogue, and
:func:`encfast.ops.varlen_attn`. A pre-norm block has its two norms besides, one with rotary
positions the rotation.

    pack_experts(model, dtype=torch.bfloat16)

puts packed weights into the mixtures of a model and leaves the rest of it as it is.
"""

from encfast.inference.compiled import CompiledEncoder, compile_encoder
from encfast.inference.experts import PackedExperts, pack_experts

__all__ = ["CompiledEncoder", "PackedExperts", "compile_encoder", "pack_experts"]
