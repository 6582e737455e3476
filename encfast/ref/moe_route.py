"""What encfast.ops.moe_route means, in plain PyTorch."""

import torch
from torch import Tensor

from .moe_noise import gumbel, jitter, priority_keys

LEAST_SUM = 1e-20  # gates are divided by at least this


def moe_route(
    logits: Tensor,
    mask: Tensor | None,
    top_k: int,
    scoring: str = "softmax",
    renormalise: str = "none",
    capacity_factor: float | None = None,
    min_capacity: int = 0,
    priority: str = "position",
    noise: str | None = None,
    rng: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logits [N, E] -> gates, expert_ids, rows, slots, cu_seqlens, probabilities.

    Experts are chosen in float32 whatever the dtype; everything else runs in float32 or wider. The
    arguments are those of `encfast.ops.route_tokens`, and rng, int64 [2]: Philox's seed and offset.
    """
    n, experts = logits.shape
    real = logits.new_ones(n, dtype=torch.bool) if mask is None else mask
    expert_ids = choose_experts(logits.detach().float(), top_k, noise, rng)
    expert_ids = expert_ids.masked_fill(~real[:, None], -1)
    capacity = keys = None
    if capacity_factor is not None:
        load = torch.ceil(real.sum().double() / experts * capacity_factor)
        capacity = load.clamp(min_capacity, max(n, min_capacity)).long()
        if priority == "random":
            assert rng is not None
            keys = priority_keys(rng, n, top_k)
    rows, slots, cu_seqlens = sort_choices(expert_ids, experts, capacity, keys)
    probabilities = score(logits, real, scoring)
    gates = gates_of(probabilities, expert_ids, slots, renormalise)
    return gates, expert_ids, rows, slots, cu_seqlens, probabilities


def choose_experts(logits: Tensor, top_k: int, noise: str | None, rng: Tensor | None) -> Tensor:
    """int32 [N, K]: the largest logits first, equals by expert id; NaN counts as the smallest."""
    noised = logits
    if noise is not None:
        assert rng is not None
        noised = logits + gumbel(rng, *logits.shape)
    if noise != "gumbel_rest":
        return _descending(_order(noised))[:, :top_k].int()
    first = _descending(_order(logits))[:, :1]
    others = _descending(_order(noised).scatter(1, first, -(2**40)))
    return torch.cat([first, others[:, : top_k - 1]], 1).int()


def _descending(keys: Tensor) -> Tensor:
    return keys.argsort(dim=1, descending=True, stable=True)


def _order(x: Tensor) -> Tensor:
    """int64 keys in the order of float32 numbers."""
    bits = x.contiguous().view(torch.int32).long()
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill(x == 0, 0)
    return keys.masked_fill(x.isnan(), -(2**31))


def sort_choices(
    expert_ids: Tensor, experts: int, capacity: Tensor | None = None, keys: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """expert_ids [N, K] -> rows [N * K], slots [N, K], cu_seqlens [E + 1], all int32; E = experts.

    The choices of an expert stand in the order (rank of the choice, token). It keeps the first
    `capacity` of them; with keys [N, K] those of (rank, key, token). An id of -1 is no choice.
    """
    n, k = expert_ids.shape
    device = expert_ids.device
    owner = expert_ids.T.flatten().long()  # choice i is that of rank i // N of token i % N
    owner = torch.where(owner < 0, experts, owner)
    counts = owner.new_zeros(experts + 1).index_add(0, owner, torch.ones_like(owner))
    starts = counts.cumsum(0) - counts
    by_priority = torch.arange(n * k, device=device)
    if keys is not None:
        by_priority = keys.T.flatten().argsort(stable=True)
        by_priority = by_priority[(by_priority // max(n, 1)).argsort(stable=True)]
    by_priority = by_priority[owner[by_priority].argsort(stable=True)]
    place = torch.arange(n * k, device=device) - starts[owner[by_priority]]
    kept = torch.zeros(n * k, dtype=torch.bool, device=device)
    kept[by_priority] = place < (n * k if capacity is None else capacity)
    owner = torch.where(kept, owner, experts)
    counts = owner.new_zeros(experts + 1).index_add(0, owner, torch.ones_like(owner))[:experts]
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    order = owner.argsort(stable=True)
    inside = torch.arange(n * k, device=device) < cu_seqlens[-1]
    flat = order % max(n, 1) * k + order // max(n, 1)
    rows = torch.where(inside, flat, -1)
    slots = torch.empty_like(rows)
    slots[flat] = torch.where(inside, torch.arange(n * k, device=device), -1)
    return rows.int(), slots.view(n, k).int(), cu_seqlens.int()


def score(logits: Tensor, real: Tensor, scoring: str) -> Tensor:
    """[N, E] in float32 or wider, 0 in rows that are no tokens."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide = wide.masked_fill(~real[:, None], 0)
    scores = wide.softmax(1) if scoring == "softmax" else wide.sigmoid()
    return scores.masked_fill(~real[:, None], 0)


def gates_of(probabilities: Tensor, expert_ids: Tensor, slots: Tensor, renormalise: str) -> Tensor:
    """[N, K]: what each choice weighs, 0 where it was dropped."""
    chosen = probabilities.gather(1, expert_ids.clamp(min=0).long())
    kept = chosen.masked_fill(slots < 0, 0)
    if renormalise == "none":
        return kept
    among = kept if renormalise == "kept" else chosen
    return kept / among.sum(1, keepdim=True).clamp(min=LEAST_SUM)


def moe_permute(x: Tensor, rows: Tensor, top_k: int) -> Tensor:
    """x [N, C] -> [N * K, C], K = top_k: the token of each slot, by rows [N * K]; 0 behind them."""
    token = rows.clamp(min=0).long() // top_k
    return x.index_select(0, token).masked_fill(rows[:, None] < 0, 0)


def moe_unpermute(y: Tensor, gates: Tensor | None, slots: Tensor) -> Tensor:
    """y [N * K, C] -> [N, C]: the sum over a token's kept choices, weighted by gates [N, K].

    slots [N, K] say where a choice stands in y, -1 where it was dropped. Half types are multiplied
    and summed in float32 and rounded once.
    """
    wide = torch.promote_types(y.dtype, torch.float32)
    parts = _rows_of_choices(y, slots).to(wide)
    if gates is not None:
        parts = parts * gates.to(wide).masked_fill(slots < 0, 0)[:, :, None]
    return parts.sum(1).to(y.dtype)


def moe_route_bwd(
    dgates: Tensor | None,
    dprobabilities: Tensor | None,
    probabilities: Tensor,
    expert_ids: Tensor,
    slots: Tensor,
    scoring: str,
    renormalise: str,
) -> Tensor:
    """Gradient of logits [N, E], in the dtype of probabilities."""
    p, real, kept = probabilities, expert_ids[:, :1] >= 0, slots >= 0
    dp = torch.zeros_like(p) if dprobabilities is None else dprobabilities
    if dgates is not None:
        ids = expert_ids.clamp(min=0).long()
        dchosen, chosen = dgates.masked_fill(~kept, 0), p.gather(1, ids)
        if renormalise != "none":
            among = kept if renormalise == "kept" else real.expand_as(kept)
            total = chosen.masked_fill(~among, 0).sum(1, keepdim=True)
            divisor = total.clamp(min=LEAST_SUM)
            shared = (dchosen * chosen.masked_fill(~kept, 0)).sum(1, keepdim=True) / divisor
            shared = shared.masked_fill(total < LEAST_SUM, 0)
            dchosen = ((dchosen - shared) / divisor).masked_fill(~among, 0)
        dp = dp.scatter_add(1, ids, dchosen)
    slope = dp - (p * dp).sum(1, keepdim=True) if scoring == "softmax" else (1 - p) * dp
    return (p * slope).masked_fill(~real, 0)


def moe_unpermute_bwd(
    dout: Tensor, y: Tensor, gates: Tensor, rows: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of y, in its dtype, and of gates, in float32 or wider."""
    wide = torch.promote_types(y.dtype, torch.float32)
    weight = gates.to(wide).flatten()[rows.clamp(min=0).long()]
    dy = moe_permute(dout.to(wide), rows, slots.shape[1])
    dy = (dy * weight[:, None]).masked_fill(rows[:, None] < 0, 0)
    products = dout.to(wide)[:, None] * _rows_of_choices(y, slots).to(wide)
    return dy.to(y.dtype), products.sum(2).masked_fill(slots < 0, 0)


def _rows_of_choices(y: Tensor, slots: Tensor) -> Tensor:
    """y [N * K, C] -> [N, K, C], 0 where a choice was dropped."""
    rows = y.index_select(0, slots.flatten().clamp(min=0).long()).view(*slots.shape, y.shape[1])
    return rows.masked_fill(slots[:, :, None] < 0, 0)


def moe_jitter(x: Tensor, rng: Tensor, amount: float) -> Tensor:
    """x [N, C] times numbers uniform in (1 - amount, 1 + amount), in float32, rounded once.

    The numbers are Philox's, of seed and offset in rng, int64 [2].
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * jitter(rng, x.shape[0], x.shape[1], amount).to(wide)).to(x.dtype)
