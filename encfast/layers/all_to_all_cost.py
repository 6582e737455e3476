"""What expert parallelism sends, and how long that takes, on clusters nobody has at hand."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AllToAllCost:
    """Bytes and seconds of one MoE layer's exchanges. Arithmetic, nothing is measured.

    Of p processes, G on a node, each sends n = tokens * top_k * dim * element_bytes bytes per
    exchange, spread evenly over all p. Sending m bytes to one of k peers after the other takes
    ``k * latency + m / bandwidth``, within a node (a, A) or between nodes (b, B)::

        flat          (G - 1) a + (p - G) b   + n (G - 1) / p / A + n (p - G) / p / B
        hierarchical  (G - 1) a + (p/G - 1) b + n (G - 1) / G / A + n (p - G) / p / B

    Hierarchical: first within the node, all rows for the j-th process of any node to the j-th of
    this one, then between processes of equal j. Messages fall from O(p) to O(G + p/G), and what is
    sent doubles, inside of nodes alone. The rows' re-arrangement in memory is left out.

    Forward exchanges rows twice, there and back, and once E counts, of which only the latency
    matters; backward exchanges gradients twice.

    Source: Rajbhandari et al., DeepSpeed-MoE (arXiv 2201.05596), section 5, hierarchical
    all-to-all; the latency-bandwidth model is Hockney's (1994).
    """

    processes: int  # p
    per_node: int  # G, processes of a node; divides p, or p is smaller
    tokens: int  # of a process, per layer
    dim: int  # C, channels of a row
    top_k: int = 1  # K
    element_bytes: int = 2  # of a channel: 2 in bf16
    intra_bandwidth: float = 300e9  # A, bytes per second of a process within a node (NVLink 3)
    inter_bandwidth: float = 25e9  # B, of a process between nodes (200 Gb/s InfiniBand each)
    intra_latency: float = 3e-6  # a, seconds per message
    inter_latency: float = 10e-6  # b

    def __post_init__(self) -> None:
        for name in ("processes", "per_node", "tokens", "dim", "top_k", "element_bytes"):
            least = 0 if name == "tokens" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected >= {least}")
        for name in ("intra_bandwidth", "inter_bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0")
        for name in ("intra_latency", "inter_latency"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected >= 0")
        if self.processes > self.per_node and self.processes % self.per_node:
            raise ValueError(
                f"processes is {self.processes}, expected at most per_node, {self.per_node}, or a "
                "multiple of it"
            )

    @property
    def exchanged_bytes(self) -> int:
        """n: what a process sends in one exchange, the part that stays with it included."""
        return self.tokens * self.top_k * self.dim * self.element_bytes

    def token_bytes(self, *, backward: bool = True) -> int:
        """What a token moves in this layer: two exchanges, with ``backward`` four."""
        return (4 if backward else 2) * self.top_k * self.dim * self.element_bytes

    def exchange_seconds(self, *, hierarchical: bool = False) -> float:
        """One exchange of rows."""
        return self._seconds(self.exchanged_bytes, hierarchical)

    def layer_seconds(self, *, hierarchical: bool = False, backward: bool = True) -> float:
        """All exchanges of the layer, one after another and beside no computation."""
        rows = (4 if backward else 2) * self._seconds(self.exchanged_bytes, hierarchical)
        return rows + self._seconds(0, hierarchical)

    def _seconds(self, n: int, hierarchical: bool) -> float:
        p, g = self.processes, min(self.per_node, self.processes)
        peers = (g - 1, p // g - 1 if hierarchical else p - g)
        latency = peers[0] * self.intra_latency + peers[1] * self.inter_latency
        inside = n * (g - 1) / (g if hierarchical else p)
        return latency + inside / self.intra_bandwidth + n * (p - g) / p / self.inter_bandwidth
