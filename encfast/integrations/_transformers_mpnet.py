"""MPNet on packed rows. transformers does not route its attention, so its classes are taken over.

The relative position bias becomes a table of the offsets: in MPNet all farther than 128 share a
bucket, so no matrix ``[B, H, S, S]`` is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder, MPNetSelfAttention

from encfast import ops
from encfast.integrations._grids import starts
from encfast.integrations._transformers_attention import Lengths, attention_forward
from encfast.integrations._transformers_masks import has_gaps
from encfast.integrations._transformers_packing import Grid
from encfast.packed import PackedBatch

_FARTHEST = 128  # max_distance of relative_position_bucket


class PackedEncoder(MPNetEncoder):
    """Packs in front of the blocks and pads behind them, unless the mask asks for the grid."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As upstream, with the masks that ``attn_implementation="encfast"`` makes."""
        kwargs["output_attentions"] = output_attentions
        on_grid = output_attentions
        if attention_mask is not None:  # distances count
            on_grid = on_grid or attention_mask.dim() == 4 or has_gaps(attention_mask)
        if on_grid:
            return super().forward(hidden_states, attention_mask, **kwargs)
        if attention_mask is None:
            lengths: Any = Lengths.of(starts(hidden_states), hidden_states.shape[1])
            return super().forward(hidden_states, lengths, **kwargs)
        rows = PackedBatch.pack(hidden_states, attention_mask)
        lengths = Lengths.of(rows.cu_seqlens, rows.max_seqlen)
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
        attention_mask: Lengths | Tensor | None,
        position_bias: Tensor,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        """As upstream, with lengths in the place of a mask and a table in that of the bias."""
        heads = (self.num_attention_heads, self.attention_head_size)
        q, k, v = (f(hidden_states).unflatten(-1, heads) for f in (self.q, self.k, self.v))
        dropout = self.dropout.p if self.training else 0.0
        told: dict[str, Any]
        out: Any
        weights: Any = None
        if isinstance(attention_mask, Lengths):
            told = attention_mask.arguments()
            told |= {"rel_bias": position_bias, "dropout_p": dropout or None}
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            out = ops.varlen_attn(q, k, v, **told)
        else:
            told = {
                "attention_mask": attention_mask,
                "dropout": dropout,
                "position_bias": _dense(position_bias, hidden_states.shape[1]),
                "output_attentions": output_attentions,
            }
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out, weights = attention_forward(self, q, k, v, **told)
        out = self.o(out.reshape(hidden_states.shape))
        return (out, weights) if output_attentions else (out,)


def _dense(table: Tensor, size: int) -> Tensor:
    """``[1, H, S, S]``."""
    places = torch.arange(size, device=table.device)
    offsets = (places - places[:, None]).clamp(-_FARTHEST, _FARTHEST) + _FARTHEST
    return table[:, offsets][None]


PACKED = {"MPNetEncoder": PackedEncoder, "MPNetSelfAttention": PackedSelfAttention}
