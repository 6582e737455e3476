"""Divided space-time attention of Frozen in Time beside attention of all rows to all.

One block's attentions, from fused projections to what the output projections read, forward and
backward. Divided attention, in time and in space, is computed as encfast does, and as published:
groups rearranged, class row repeated for each, two softmaxes of plain products. Joint attention, a
single one, is what it stands in for: PyTorch's SDPA and `varlen_attn`. Each is verified against
float64 attention under the full boolean masks of its kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import BenchSpec, Call, Gate, Setting, Variant, all_of, error_gate
from torch import Tensor, nn

from encfast import PackedBatch, ops
from encfast.models._frozen_in_time_video import GroupAttention, SpaceTime
from encfast.models.frozen_in_time import FrozenInTimeConfig

KINDS = {"divided": ("time", "space"), "joint": ("joint",)}


@dataclass(frozen=True)
class Case:
    """Clips of one length in ViT-B's or a smaller block."""

    batch: int
    config: FrozenInTimeConfig

    @property
    def rows(self) -> int:
        """Of a clip."""
        return 1 + self.config.frames * self.config.num_patches


@dataclass(frozen=True)
class Inputs:
    """Projections ``[B, rows, 3 * C]`` and weights of the output, and results by kind."""

    case: Case
    qkv: Tensor
    probe: Tensor  # [B, rows, C]
    exact: dict[str, tuple[Tensor, ...]]  # by name of KINDS: output and gradient of each
    plain: dict[str, tuple[Tensor, ...]]  # the same maths in the dtype


Attention = Callable[[Tensor], Tensor]  # [B, rows, 3 * C] -> [B, rows, C]


def _heads(qkv: Tensor, case: Case) -> tuple[Tensor, ...]:
    """q, k and v ``[B, H, rows, D]``."""
    parts = qkv.unflatten(2, (3, case.config.num_heads, -1))
    return parts.permute(2, 0, 3, 1, 4).unbind(0)


def _merged(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(2)


def _mask(kind: str, case: Case, device: torch.device) -> Tensor | None:
    if kind == "joint":
        return None
    patches = case.config.num_patches
    row = torch.arange(case.rows - 1, device=device)
    of = row % patches if kind == "time" else row // patches
    return F.pad(of[:, None] == of, (1, 0, 1, 0), value=True)


def _masked(kind: str, case: Case, qkv: Tensor) -> Tensor:
    """The definition: scores of all pairs, hidden ones removed."""
    q, k, v = _heads(qkv, case)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    mask = _mask(kind, case, qkv.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return _merged(scores.softmax(3) @ v)


def _published(kind: str, case: Case, qkv: Tensor) -> Tensor:
    """As m-bain/frozen-in-time has it: groups as a batch, the class row repeated for each."""
    frames, patches = case.config.frames, case.config.num_patches
    q, k, v = (x.flatten(0, 1) for x in _heads(qkv, case))  # [B * H, rows, D]
    q = q * q.shape[-1] ** -0.5

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(1, 2)).softmax(2) @ v

    def grouped(x: Tensor) -> Tensor:
        x = x.unflatten(1, (frames, patches))
        return (x.transpose(1, 2) if kind == "time" else x).flatten(0, 1)

    first = attend(q[:, :1], k, v)
    count = patches if kind == "time" else frames
    members = [grouped(x[:, 1:]) for x in (q, k, v)]
    keys, values = (
        torch.cat((x[:, :1].repeat_interleave(count, 0), own), 1)
        for x, own in zip((k, v), members[1:], strict=True)
    )
    out = attend(members[0], keys, values).unflatten(0, (-1, count))
    out = (out.transpose(1, 2) if kind == "time" else out).flatten(1, 2)
    out = torch.cat((first, out), 1)
    return _merged(out.unflatten(0, (-1, case.config.num_heads)))


def _sdpa(kind: str, case: Case, qkv: Tensor) -> Tensor:
    return _merged(F.scaled_dot_product_attention(*_heads(qkv, case)))


def _ours(case: Case, device: torch.device) -> dict[str, Attention]:
    """By kind; the geometry is made once for all blocks of a model, and not timed."""
    frames = PackedBatch.from_lengths(
        torch.empty(case.batch * case.config.frames, 0, device=device),
        [case.config.frames] * case.batch,
    )
    geometry = SpaceTime.of(frames, case.config.num_patches)
    attention = GroupAttention(case.config.block())
    attention.qkv = attention.out = nn.Identity()  # type: ignore[assignment]

    def divided(kind: str, qkv: Tensor) -> Tensor:
        return attention(qkv.flatten(0, 1), getattr(geometry, kind)).view(*qkv.shape[:2], -1)

    def joint(qkv: Tensor) -> Tensor:
        rows = qkv.flatten(0, 1).unflatten(1, (3, case.config.num_heads, -1))
        out = ops.varlen_attn(*rows.unbind(1), geometry.clips, max_seqlen_q=case.rows)
        return out.view(*qkv.shape[:2], -1)

    kinds = {kind: functools.partial(divided, kind) for kind in KINDS["divided"]}
    return kinds | {"joint": joint}


def _results(attentions: list[Attention], qkv: Tensor, probe: Tensor) -> tuple[Tensor, ...]:
    results = []
    for attention in attentions:
        leaf = qkv.detach().requires_grad_()
        out = attention(leaf)
        out.backward(probe)
        results += [out.detach(), leaf.grad]
    return tuple(results)


def _inputs(case: Case, device: str) -> Inputs:
    generator, c = torch.Generator().manual_seed(0), case.config
    qkv = torch.randn(case.batch, case.rows, 3 * c.dim, generator=generator).to(device)
    probe = torch.randn(case.batch, case.rows, c.dim, generator=generator).to(device)
    exact, plain = {}, {}
    for name, kinds in KINDS.items():
        attentions = [functools.partial(_masked, kind, case) for kind in kinds]
        exact[name] = _results(attentions, qkv.double(), probe.double())
        plain[name] = _results(attentions, qkv, probe)
    return Inputs(case, qkv, probe, exact, plain)


def _verify(inputs: Inputs, variant: Variant, found: tuple[Tensor, ...]) -> Gate:
    name = variant.name.split()[-1]
    gates = [
        error_gate(f"{'gradient' if i % 2 else 'output'} {i // 2}", *x, 3.0 if i % 2 else 2.0)
        for i, x in enumerate(zip(found, inputs.exact[name], inputs.plain[name], strict=True))
    ]
    return all_of(gates, shown=-1)


def _spec(name: str, case: Case, setting: Setting) -> BenchSpec:
    def plain(attend: Callable[..., Tensor], kinds: tuple[str, ...], inputs: Inputs) -> Call:
        attentions = [functools.partial(attend, kind, case) for kind in kinds]
        return Call(lambda: _results(attentions, inputs.qkv, inputs.probe))

    def ours(kinds: tuple[str, ...], inputs: Inputs) -> Call:
        known = _ours(case, inputs.qkv.device)
        attentions = [known[kind] for kind in kinds]
        return Call(lambda: _results(attentions, inputs.qkv, inputs.probe))

    divided, joint = KINDS["divided"], KINDS["joint"]
    made = {
        "published divided": functools.partial(plain, _published, divided),
        "encfast divided": functools.partial(ours, divided),
        "SDPA joint": functools.partial(plain, _sdpa, joint),
        "encfast joint": functools.partial(ours, joint),
    }
    fp32, c = torch.float32, case.config
    variants = tuple(Variant(n, fp32, m, ours=n.startswith("encfast")) for n, m in made.items())
    peers = "SDPA joint", "encfast joint", "published divided"
    scores, every = (c.attention_scores(c.frames, joint=j) for j in (False, True))
    return BenchSpec(
        name=f"frozen_in_time/{name}",
        title=f"Space-time attention of one block, {case.batch} clips of {c.frames} frames, fp32",
        inputs=lambda: _inputs(case, setting.device),
        variants=variants,
        verify=_verify,
        tokens=lambda inputs: float(case.batch * case.rows),
        pairs=tuple(("encfast divided", peer) for peer in peers),
        budget_s={"tiny": 0.2, "quick": 6.0, "full": 15.0}[setting.suite],
        facts=(
            f"a head scores {scores:,} pairs of a clip, joint {every:,}: {every / scores:.2f}x",
        ),
    )


def specs(setting: Setting) -> list[BenchSpec]:
    """The benches of a suite."""
    if setting.suite == "tiny":
        config = FrozenInTimeConfig(image_size=(32, 32), dim=32, num_heads=2, frames=3)
        return [_spec("tiny", Case(2, config), setting)]
    if setting.suite == "quick":  # an ablation of one model; bench/mae.py is a taste of it
        return []
    return [
        _spec(f"attention-F{n}-fwd+bwd-fp32", Case(2, FrozenInTimeConfig(frames=n)), setting)
        for n in (4, 8)
    ]
