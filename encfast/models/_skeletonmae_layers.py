"""What SkeletonMAE stacks: graph layers over joints, and pooling over time for its recogniser."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast import ops
from encfast.layers import BatchNorm, GATLayer, GCNLayer, GINLayer
from encfast.models._skeletonmae_config import SkeletonMaeConfig
from encfast.packed import PackedBatch


class GraphStack(nn.Module):
    """Graph layers with PReLU between them: ``[..., V, in_dim]`` -> ``[..., V, out_dim]``."""

    def __init__(
        self, config: SkeletonMaeConfig, in_dim: int, out_dim: int, depth: int, **factory: Any
    ) -> None:
        super().__init__()
        graph, hidden = config.graph(), config.hidden_dim
        widths = [in_dim, *[hidden] * (depth - 1), out_dim]
        self.layers = nn.ModuleList()
        for i in range(depth):
            dims = widths[i], widths[i + 1]
            layer: nn.Module
            if config.convolution == "gin":
                layer = GINLayer(graph, *dims, hidden_dim=hidden, norm=config.norm, **factory)
            elif config.convolution == "gcn":
                layer = GCNLayer(graph, *dims, **factory)
            else:
                layer = GATLayer(graph, *dims, **factory)
            self.layers.append(layer)
        self.acts = nn.ModuleList(nn.PReLU(**factory) for _ in range(depth - 1))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., V, in_dim]`` -> ``[..., V, out_dim]``."""
        for layer, act in zip(self.layers, self.acts, strict=False):
            x = act(layer(x))
        return self.layers[-1](x)


class TemporalPool(nn.Module):
    """Several time scales side by side: dilated convolutions, a maximum, and the frame itself.

    Clips stand one after another with ``reach`` rows of zeros between them, so that one convolution
    over all pads every clip with zeros. The maximum follows a ReLU, where zeros change nothing.
    """

    def __init__(self, config: SkeletonMaeConfig, **factory: Any) -> None:
        super().__init__()
        self.branches = len(config.dilations) + 2
        width = config.dim // self.branches
        self.up = nn.Linear(config.dim, config.dim, **factory)
        self.up_norm = BatchNorm(config.dim, **factory)
        self.convs = nn.ModuleList(
            nn.Conv1d(
                width,
                width,
                config.kernel_size,
                padding=dilation * (config.kernel_size // 2),
                dilation=dilation,
                **factory,
            )
            for dilation in config.dilations
        )
        self.norm = BatchNorm(width * (self.branches - 1), **factory)

    def forward(self, x: Tensor, spread: Tensor, back: Tensor) -> Tensor:
        """``[N, J, D]`` -> ``[N, J, D]``; see :func:`time_line` for the indices."""
        x = self.up_norm(self.up(x))
        width = x.shape[-1] // self.branches
        moving, still = x.split([width * (self.branches - 1), width], -1)
        line = ops.gather_rows(F.relu(moving), spread)  # [L, J, 3 D / 4], zeros between clips
        scales = line.permute(1, 2, 0).split(width, 1)  # of [J, D / 4, L]
        pooled = [conv(part) for conv, part in zip(self.convs, scales, strict=False)]
        pooled.append(_max_of_three(scales[-1]))
        line = torch.cat(pooled, 1).permute(2, 0, 1)  # [L, J, 3 D / 4]
        moving = self.norm(ops.gather_rows(line.contiguous(), back))
        return torch.cat((moving, still), -1)


def _max_of_three(x: Tensor) -> Tensor:
    """Maximum over a frame and the two beside it, of ``[..., L]`` >= 0."""
    # max_pool1d would compile once per length.
    wide = F.pad(x, (1, 1))
    return torch.maximum(torch.maximum(wide[..., :-2], wide[..., 2:]), x)


def time_line(batch: PackedBatch, gap: int) -> tuple[Tensor, Tensor]:
    """Where rows stand when every sequence is followed by ``gap`` rows of zeros.

    Returns:
        int64 ``[N + B * gap]``: the row at each place, -1 for zeros; int64 ``[N]``: the place of
        each row.
    """
    rows = torch.arange(batch.total, device=batch.device)
    back = rows + gap * batch.segment_ids()  # [N]
    line = torch.full(
        (batch.total + gap * batch.batch_size,), -1, dtype=torch.int64, device=batch.device
    )
    return line.index_copy(0, back, rows), back


class StrlLayer(nn.Module):
    """Spatial-Temporal Representation Learning: SM structure, temporal pooling, residual."""

    def __init__(self, config: SkeletonMaeConfig, **factory: Any) -> None:
        super().__init__()
        dims = config.dim, config.hidden_dim, config.encoder_depth
        self.encoders = nn.ModuleList(
            GraphStack(config, *dims, **factory) for _ in range(config.num_persons)
        )
        self.mix = nn.Linear(config.dim, config.dim, **factory)
        self.time = TemporalPool(config, **factory)
        self.residual = nn.Linear(config.dim, config.dim, **factory)  # a 1 x 1 convolution

    def structure(self, x: Tensor) -> Tensor:
        """SM, ``[N, P, V, D]`` -> same: each joint and the sum of its body's encoded joints."""
        bodies = [
            encoder(person).sum(-2)  # [N, D]
            for encoder, person in zip(self.encoders, x.unbind(1), strict=True)
        ]
        return x + torch.stack(bodies, 1)[:, :, None]

    def forward(self, x: Tensor, spread: Tensor, back: Tensor) -> Tensor:
        """``[N, P, V, D]`` -> same; see :func:`time_line` for the indices."""
        y = F.relu(self.mix(self.structure(x)))
        y = self.time(y.flatten(1, 2), spread, back).view(x.shape)
        return F.relu(y + self.residual(x))
