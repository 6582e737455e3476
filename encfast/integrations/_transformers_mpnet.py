"""MPNet on packed rows. transformers does not route its attention, so its classes are taken over.

The relative position bias becomes a table of the offsets: in MPNet all farther than 128 share a
bucket, so no matrix ``[B, H, S, S]`` is made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder, MPNetSelfAttention

from encfast import ops
from encfast.integrations._transformers_attention import attention_forward
from encfast.integrations._transformers_masks import has_gaps
from encfast.integrations._transformers_packing import Grid
from encfast.packed import PackedBatch

_FARTHEST = 128  # max_distance of relative_position_bucket


class _Lengths(NamedTuple):
    """Of the texts, in the place of the mask."""

    cu_seqlens: Tensor
    max_seqlen: int


class PackedEncoder(MPNetEncoder):
    """Packs in front of the blocks and pads behind them, unless the mask asks for the grid."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As upstream, with the masks that ``attn_implementation="encfast"`` makes."""
        lengths: Any
        if attention_mask is None:
            batch, size = hidden_states.shape[:2]
            starts = torch.arange(batch + 1, dtype=torch.int32, device=hidden_states.device) * size
            lengths = _Lengths(starts, size)
            return super().forward(hidden_states, lengths, **kwargs)
        if attention_mask.dim() == 4 or has_gaps(attention_mask):  # distances count
            return super().forward(hidden_states, attention_mask, **kwargs)
        rows = PackedBatch.pack(hidden_states, attention_mask)
        lengths = _Lengths(rows.cu_seqlens, rows.max_seqlen)
        output = super().forward(rows.data[None], lengths, **kwargs)
        return Grid.of(rows).pad_output(output)

    def compute_position_bias(self, *_: Any, **__: Any) -> Tensor:
        """``[H, 2 * 128 + 1]``, the bias of each offset of a key from its query."""
        device = self.relative_attention_bias.weight.device
        offsets = torch.arange(-_FARTHEST, _FARTHEST + 1, device=device)
        return self.relative_attention_bias(self.relative_position_bucket(offsets)).t()


class PackedSelfAttention(MPNetSelfAttention):
    """The attention of :class:`PackedEncoder`."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: _Lengths | Tensor,
        position_bias: Tensor,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor]:
        """As upstream, with lengths in the place of a mask and a table in that of the bias."""
        heads = (self.num_attention_heads, self.attention_head_size)
        q, k, v = (f(hidden_states).unflatten(-1, heads) for f in (self.q, self.k, self.v))
        dropout = self.dropout.p if self.training else 0.0
        out: Any
        if isinstance(attention_mask, Tensor) or output_attentions:
            grids: Any = (x.transpose(1, 2) for x in (q, k, v))
            told: dict[str, Any] = {
                "attention_mask": attention_mask,
                "dropout": dropout,
                "position_bias": _dense(position_bias, hidden_states.shape[1]),
                "output_attentions": output_attentions,
            }
            out, _ = attention_forward(self, *grids, **told)
        else:
            lengths, longest = attention_mask
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            out = ops.varlen_attn(
                q,
                k,
                v,
                lengths,
                max_seqlen_q=longest,
                max_seqlen_k=longest,
                rel_bias=position_bias,
                dropout_p=dropout or None,
            )
        return (self.o(out.reshape(hidden_states.shape)),)


def _dense(table: Tensor, size: int) -> Tensor:
    """``[1, H, S, S]``."""
    places = torch.arange(size, device=table.device)
    offsets = (places - places[:, None]).clamp(-_FARTHEST, _FARTHEST) + _FARTHEST
    return table[:, offsets][None]


PACKED = {"MPNetEncoder": PackedEncoder, "MPNetSelfAttention": PackedSelfAttention}
