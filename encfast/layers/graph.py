"""Graph convolutions over many small graphs that share one adjacency, such as skeletons.

The features of all graphs are one tensor ``[..., V, C]``, and a sum over neighbours is a dense
product with the ``[V, V]`` adjacency: at tens of nodes that beats index lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast.config import nearest
from encfast.layers.batchnorm import BatchNorm

GraphNorm = Literal["batch", "none"]


@dataclass(frozen=True)
class Graph:
    """An undirected graph without self-loops.

    Raises:
        ValueError: for an edge to a node that is not there, to itself, or listed twice.
    """

    num_nodes: int  # V
    edges: tuple[tuple[int, int], ...]  # each once, in either direction

    def __post_init__(self) -> None:
        if self.num_nodes < 1:
            raise ValueError(f"num_nodes must be >= 1, got {self.num_nodes}")
        for edge in self.edges:
            if len(edge) != 2 or not all(0 <= node < self.num_nodes for node in edge):
                raise ValueError(f"edges holds {edge}, expected two nodes in [0, {self.num_nodes})")
            if edge[0] == edge[1]:
                raise ValueError(f"edges holds {edge}, a self-loop; layers add their own")
        if len({frozenset(edge) for edge in self.edges}) < len(self.edges):
            raise ValueError("edges holds an edge twice; list each once, in either direction")

    def adjacency(self, device: torch.device | str | None = None) -> Tensor:
        """fp32 ``[V, V]`` on ``device``: symmetric, 1 where an edge is, 0 elsewhere."""
        matrix = torch.zeros(self.num_nodes, self.num_nodes)
        for i, j in self.edges:
            matrix[i, j] = matrix[j, i] = 1
        return matrix.to(device)


class GraphLayer(nn.Module):
    """Base of the layers: the ``[V, V]`` matrix that mixes nodes, a buffer made from the graph.

    Args:
        graph: its nodes and edges.
        in_dim: channels of a node.
    """

    matrix: Tensor

    def __init__(
        self,
        graph: Graph,
        in_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.graph, self.in_dim = graph, in_dim
        shape = graph.num_nodes, graph.num_nodes
        # Not persistent: the graph is configuration, and weights move between graphs.
        matrix = torch.empty(shape, device=device, dtype=dtype)
        self.register_buffer("matrix", matrix, persistent=False)

    def mixing(self) -> Tensor:
        """fp32 ``[V, V]``: what :attr:`matrix` holds."""
        return self.graph.adjacency()

    def reset_parameters(self) -> None:
        """Fills the matrix; children reset themselves."""
        self.matrix.copy_(self.mixing())

    def check(self, x: Tensor) -> None:
        """Raises ValueError unless x is ``[..., V, C]`` of this layer's V and C."""
        expected = self.graph.num_nodes, self.in_dim
        if x.dim() < 2 or x.shape[-2:] != expected:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected [..., {expected[0]}, {expected[1]}]: "
                f"the adjacency has {expected[0]} nodes, the layer {expected[1]} channels"
            )

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"{self.graph.num_nodes} nodes, {len(self.graph.edges)} edges"


class GINLayer(GraphLayer):
    """Graph isomorphism layer: ``h_i' = MLP((1 + eps) h_i + sum_{j in N(i)} h_j)``.

    The MLP is ``out(act(norm(up(h))))``. Source: Xu et al. 2019, arXiv 1810.00826, equation 4.1.

    Args:
        graph: of V nodes.
        in_dim, out_dim: channels.
        hidden_dim: of the MLP; ``out_dim`` if None.
        norm: ``"batch"``: batch normalisation over all nodes of all graphs; or ``"none"``.
        act: activation of the MLP, a fresh module; PReLU if None.
        learn_eps: eps, 0 at first, is a parameter.

    Raises:
        ValueError: for another norm.
    """

    eps: Tensor

    def __init__(
        self,
        graph: Graph,
        in_dim: int,
        out_dim: int,
        *,
        hidden_dim: int | None = None,
        norm: GraphNorm = "batch",
        act: nn.Module | None = None,
        learn_eps: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(graph, in_dim, **factory)
        if norm not in get_args(GraphNorm):
            raise ValueError(f"norm {norm!r} is unknown; {nearest(norm, get_args(GraphNorm))}")
        hidden = hidden_dim or out_dim
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden, **factory),
            BatchNorm(hidden, **factory) if norm == "batch" else nn.Identity(),
            nn.PReLU(**factory) if act is None else act,
            nn.Linear(hidden, out_dim, **factory),
        )
        eps = torch.empty(1, **factory)
        if learn_eps:
            self.eps = nn.Parameter(eps)
        else:
            self.register_buffer("eps", eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the matrix; eps is 0; children reset themselves."""
        super().reset_parameters()
        nn.init.zeros_(self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., V, C]`` -> ``[..., V, out_dim]``.

        Raises:
            ValueError: if x has another number of nodes or channels.
        """
        self.check(x)
        mixed = torch.matmul(self.matrix, x)  # [..., V, C]
        return self.mlp(mixed.addcmul(x, 1 + self.eps))


class GCNLayer(GraphLayer):
    """``h' = D^-1/2 (A + I) D^-1/2 h W + b``, D the degrees of A + I.

    Source: Kipf and Welling 2017, arXiv 1609.02907, equation 2 without its activation.

    Args:
        graph: of V nodes.
        in_dim, out_dim: channels.
    """

    def __init__(
        self,
        graph: Graph,
        in_dim: int,
        out_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(graph, in_dim, **factory)
        self.linear = nn.Linear(in_dim, out_dim, **factory)
        self.reset_parameters()

    def mixing(self) -> Tensor:
        """fp32 ``[V, V]``: the normalised adjacency."""
        with_loops = self.graph.adjacency() + torch.eye(self.graph.num_nodes)
        scale = with_loops.sum(1).rsqrt()
        return scale[:, None] * with_loops * scale

    def forward(self, x: Tensor) -> Tensor:
        """``[..., V, C]`` -> ``[..., V, out_dim]``.

        Raises:
            ValueError: if x has another number of nodes or channels.
        """
        self.check(x)
        return self.linear(torch.matmul(self.matrix, x))


class GATLayer(GraphLayer):
    """Attention over a node and its neighbours, heads side by side.

    ``h_i' = sum_j a_ij W h_j + b`` with ``a_ij = softmax_j(leaky_relu(s . W h_j + t . W h_i))``
    over i itself and its neighbours, slope 0.2. Source: Velickovic et al. 2018, arXiv 1710.10903,
    equations 1 to 5 without the activation.

    Args:
        graph: of V nodes.
        in_dim, out_dim: channels.
        num_heads: H, divides ``out_dim``.

    Raises:
        ValueError: if it does not.
    """

    def __init__(
        self,
        graph: Graph,
        in_dim: int,
        out_dim: int,
        *,
        num_heads: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(graph, in_dim, **factory)
        if num_heads < 1 or out_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide out_dim={out_dim}")
        self.num_heads = num_heads
        self.linear = nn.Linear(in_dim, out_dim, bias=False, **factory)
        self.source = nn.Parameter(torch.empty(num_heads, out_dim // num_heads, **factory))
        self.target = nn.Parameter(torch.empty(num_heads, out_dim // num_heads, **factory))
        self.bias = nn.Parameter(torch.empty(out_dim, **factory))
        self.reset_parameters()

    def mixing(self) -> Tensor:
        """fp32 ``[V, V]``: 0 where a node looks, -inf elsewhere."""
        seen = self.graph.adjacency() + torch.eye(self.graph.num_nodes)
        return torch.zeros_like(seen).masked_fill(seen == 0, -torch.inf)

    def reset_parameters(self) -> None:
        """Glorot's uniform for the attention vectors, bias 0."""
        super().reset_parameters()
        nn.init.xavier_uniform_(self.source)
        nn.init.xavier_uniform_(self.target)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., V, C]`` -> ``[..., V, out_dim]``.

        Raises:
            ValueError: if x has another number of nodes or channels.
        """
        self.check(x)
        z = self.linear(x).unflatten(-1, (self.num_heads, -1))  # [..., V, H, D]
        sources = (z * self.source).sum(-1).transpose(-1, -2)  # [..., H, V]
        targets = (z * self.target).sum(-1).transpose(-1, -2)
        scores = F.leaky_relu(targets[..., :, None] + sources[..., None, :], 0.2)
        probs = (scores + self.matrix).softmax(-1)  # [..., H, V, V]
        mixed = torch.matmul(probs, z.transpose(-2, -3))  # [..., H, V, D]
        return mixed.transpose(-2, -3).flatten(-2) + self.bias
