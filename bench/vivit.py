"""One optimiser step of ViViT: everything trained, and the spatial transformer frozen.

The peer is transformers' ViT on each time index and torch's TransformerEncoder on the class rows,
with the same weights and clips; frozen, its ViT runs without gradients. Before anything is timed,
the loss of the first step, and the norm of the gradients of temporal transformer and head, must
equal those of the peer in float32. The new adapter of our frozen step starts at zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from harness import BenchSpec, Call, Setting, Variant
from steps import Step, adamw_step, verify_step
from torch import Tensor, nn

from encfast import create
from encfast.data import ClipBatch
from encfast.models._vivit_weights import image_names
from encfast.weights import Tied, export

FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """What is trained, on how many clips of full length at once."""

    title: str
    batch: int
    variant: str = "base"
    overrides: tuple[tuple[str, Any], ...] = ()  # fields of the variant's config

    def model(self) -> Any:
        """Ours, the same random weights each time, a head that is not zero."""
        torch.manual_seed(0)
        model = create(f"vivit/{self.variant}", **dict(self.overrides))
        nn.init.normal_(model.head.weight, std=0.02)
        return model


@dataclass(frozen=True)
class Inputs:
    """Clips, and what the first step gives."""

    case: Case
    videos: Tensor  # [B, C, T, H, W]
    labels: Tensor  # [B]
    expected: tuple[float, float]  # loss, norm of the gradients of temporal transformer and head


class Peer(nn.Module):
    """A ViT per time index, a transformer over time."""

    def __init__(self, config: Any, *, frozen: bool) -> None:
        from transformers import ViTConfig, ViTModel

        super().__init__()
        c, self.frozen = config, frozen
        self.depth = c.patch_size[0]
        vit = ViTConfig(
            image_size=c.image_size,
            patch_size=c.patch_size[1],
            num_channels=c.channels * self.depth,  # a tubelet's frames are channels to it
            hidden_size=c.dim,
            num_hidden_layers=c.spatial_depth,
            num_attention_heads=c.num_heads,
            intermediate_size=c.ffn_dim,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=c.norm_eps,
            attn_implementation="sdpa",
        )
        self.vit = ViTModel(vit, add_pooling_layer=False).requires_grad_(not frozen)
        layer = nn.TransformerEncoderLayer(
            c.dim,
            c.num_heads,
            c.ffn_dim,
            dropout=0.0,
            activation=functools.partial(F.gelu, approximate="tanh"),
            layer_norm_eps=c.norm_eps,
            batch_first=True,
            norm_first=True,
        )
        norm = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.time = nn.TransformerEncoder(layer, c.temporal_depth, norm, enable_nested_tensor=False)
        self.class_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.table = nn.Parameter(torch.zeros(1 + c.time, c.dim))
        self.head = nn.Linear(c.dim, c.num_labels)

    def forward(self, videos: Tensor) -> Tensor:
        """``[B, C, T, H, W]`` -> ``[B, K]``."""
        pieces = videos.unflatten(2, (-1, self.depth)).transpose(1, 2)  # [B, T', C, t, H, W]
        with torch.set_grad_enabled(not self.frozen):
            rows = self.vit(pieces.flatten(2, 3).flatten(0, 1)).last_hidden_state[:, 0]
        rows = rows.unflatten(0, pieces.shape[:2])  # [B, T', C]
        x = torch.cat((self.class_token.expand(len(rows), -1, -1), rows), 1) + self.table
        return self.head(self.time(x)[:, 0])


def _names(config: Any) -> list[Tied]:
    """What our tensors are called in :class:`Peer`."""
    c, entries = config, []
    kernel = (c.dim, c.channels * c.patch_size[0], *c.patch_size[1:])
    for tied in image_names(c):
        shapes = (tied.shapes[0], kernel) if tied.ours == "embed.proj.weight" else tied.shapes
        entries.append(Tied(tied.ours, tuple(f"vit.{n}" for n in tied.theirs), shapes=shapes))
    token = ((c.dim,), (1, 1, c.dim))
    entries.append(Tied("temporal.class_token", ("class_token",), shapes=token))
    pairs = {"temporal.positions.table": "table"}
    for kind in ("weight", "bias"):
        pairs |= {f"head.{kind}": f"head.{kind}", f"temporal.norm.{kind}": f"time.norm.{kind}"}
        for i in range(c.temporal_depth):
            ours, theirs = f"temporal.stack.blocks.{i}", f"time.layers.{i}"
            pairs |= {
                f"{ours}.attn.qkv.{kind}": f"{theirs}.self_attn.in_proj_{kind}",
                f"{ours}.attn.out.{kind}": f"{theirs}.self_attn.out_proj.{kind}",
                f"{ours}.mlp.up.{kind}": f"{theirs}.linear1.{kind}",
                f"{ours}.mlp.down.{kind}": f"{theirs}.linear2.{kind}",
                f"{ours}.norm1.{kind}": f"{theirs}.norm1.{kind}",
                f"{ours}.norm2.{kind}": f"{theirs}.norm2.{kind}",
            }
    return entries + [Tied(ours, (theirs,)) for ours, theirs in pairs.items()]


def _inputs(case: Case, device: str) -> Inputs:
    c, generator = case.model().config, torch.Generator().manual_seed(0)
    shape = (case.batch, c.channels, c.frames, *c.image_size)
    videos = torch.randn(shape, generator=generator).to(device)
    labels = torch.randint(c.num_labels, (case.batch,), generator=generator).to(device)
    inputs = Inputs(case, videos, labels, (0.0, 0.0))
    return Inputs(case, videos, labels, _peer_step(inputs, FP32, frozen=False)())


def _peer_step(inputs: Inputs, dtype: torch.dtype, *, frozen: bool) -> Step:
    ours = inputs.case.model()
    model = Peer(ours.config, frozen=frozen).to(inputs.videos.device)
    model.load_state_dict(export(ours, _names(ours.config)))
    model.train()
    watched = [p for name, p in model.named_parameters() if not name.startswith("vit.")]

    def loss() -> Tensor:
        return F.cross_entropy(model(inputs.videos).float(), inputs.labels)

    return adamw_step(model, loss, inputs.videos.device, dtype, watched)


def _our_step(inputs: Inputs, dtype: torch.dtype, *, frozen: bool) -> Step:
    model = inputs.case.model()
    model = (model.second_stage() if frozen else model).train().to(inputs.videos.device)
    batch = ClipBatch.from_dense(inputs.videos, inputs.labels)
    watched = [*model.temporal.parameters(), *model.head.parameters()]
    return adamw_step(model, lambda: model.loss(batch).total, inputs.videos.device, dtype, watched)


def _spec(name: str, case: Case, dtype: torch.dtype, setting: Setting) -> BenchSpec:
    short, long = ("fp32", "fp32") if dtype == FP32 else ("bf16", "bf16 autocast")

    def call(make: Callable[..., Any], frozen: bool, inputs: Inputs) -> Call:
        return Call(make(inputs, dtype, frozen=frozen))

    variants = tuple(
        Variant(
            f"{who} {short} {how}",
            dtype,
            functools.partial(call, make, how == "frozen"),
            ours=make is _our_step,
        )
        for who, make in (("transformers", _peer_step), ("encfast", _our_step))
        for how in ("full", "frozen")
    )
    peer_full, peer_frozen, full, frozen = (v.name for v in variants)
    return BenchSpec(
        name=f"vivit/{name}-{short}",
        title=f"ViViT training step, {case.title}, AdamW, {long}",
        inputs=lambda: _inputs(case, setting.device),
        variants=variants,
        verify=verify_step,
        tokens=lambda inputs: float(inputs.videos.shape[0] * inputs.videos.shape[2]),  # frames
        pairs=((full, peer_full), (frozen, peer_frozen), (frozen, full)),
        needs=("transformers",),
        budget_s={"tiny": 0.2, "quick": 6.0, "full": 20.0}[setting.suite],
    )


def specs(setting: Setting) -> list[BenchSpec]:
    """The ViViT benches of a suite."""
    if setting.suite == "tiny":
        return [_spec("tiny", Case("3 clips", 3, "tiny", (("frames", 4),)), FP32, setting)]
    frames = (("frames", 8),)
    if setting.suite == "quick":  # a step takes seconds; bench/mae.py is a taste of it
        return []
    case = Case("B/16x2, 2 clips of 8 frames", 2, overrides=frames)
    return [_spec("B16x2", case, dtype, setting) for dtype in (FP32, BF16)]
