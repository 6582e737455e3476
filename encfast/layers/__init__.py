"""Thin modules over :mod:`encfast.ops`, shared by the models.

Layers take :class:`~encfast.packed.PackedBatch`; where only rows matter (norms, MLPs, heads) they
take row tensors ``[N, C]``. Projections are children of ``nn.Linear``'s kind, so that LoRA, FSDP
and weight maps of other libraries find them.
"""

from encfast.layers.all_to_all_cost import AllToAllCost
from encfast.layers.attention import Attention, alibi_slopes
from encfast.layers.batchnorm import BatchNorm, checkpointed
from encfast.layers.block import Block, Stack
from encfast.layers.cache import KVCache
from encfast.layers.cross import CrossAttention, CrossBlock
from encfast.layers.dropout import Dropout, DropPath
from encfast.layers.embed import Embeddings
from encfast.layers.expert_parallel import (
    ExpertParallel,
    average_gradients,
    expert_parameters,
    parallelise_experts,
)
from encfast.layers.experts import Experts
from encfast.layers.graph import GATLayer, GCNLayer, GINLayer, Graph
from encfast.layers.head import ClassificationHead, MaskedLMHead, SpanHead
from encfast.layers.linear import Linear
from encfast.layers.mlp import MLP, activation
from encfast.layers.moe import (
    MoE,
    MoEConfig,
    MoEOutput,
    ResidualMoE,
    RouterLosses,
    moe_layer,
    pyramid,
    sum_losses,
)
from encfast.layers.moe_block import MoEBlock, MoEStack
from encfast.layers.norm import Norm
from encfast.layers.patch import PatchEmbed
from encfast.layers.pool import pool
from encfast.layers.positions import (
    FixedPositions,
    LearnedPositions,
    resize_positions,
    sincos_positions,
)
from encfast.layers.relative import RelativeBias
from encfast.layers.rotary import Rotary
from encfast.layers.vit import PatchEncoder

__all__ = [
    "MLP",
    "AllToAllCost",
    "Attention",
    "BatchNorm",
    "Block",
    "ClassificationHead",
    "CrossAttention",
    "CrossBlock",
    "DropPath",
    "Dropout",
    "Embeddings",
    "ExpertParallel",
    "Experts",
    "FixedPositions",
    "GATLayer",
    "GCNLayer",
    "GINLayer",
    "Graph",
    "KVCache",
    "LearnedPositions",
    "Linear",
    "MaskedLMHead",
    "MoE",
    "MoEBlock",
    "MoEConfig",
    "MoEOutput",
    "MoEStack",
    "Norm",
    "PatchEmbed",
    "PatchEncoder",
    "RelativeBias",
    "ResidualMoE",
    "Rotary",
    "RouterLosses",
    "SpanHead",
    "Stack",
    "activation",
    "alibi_slopes",
    "average_gradients",
    "checkpointed",
    "expert_parameters",
    "moe_layer",
    "parallelise_experts",
    "pool",
    "pyramid",
    "resize_positions",
    "sincos_positions",
    "sum_losses",
]
