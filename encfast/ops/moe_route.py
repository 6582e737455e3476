"""Mixture of experts without matrices of zeros: choices made, rows sorted by expert and put back.

    route_tokens    p = softmax(logits), or sigmoid(logits); of each token the top_k experts
    permute_rows    out[s] = x[rows[s] // K], 0 where rows[s] is -1
    unpermute_rows  out[t] = sum over j of gates[t, j] * y[slots[t, j]], kept choices only

Conventions. Experts are ranked by their logits in float32, equals by id; noise moves the ranking
and never p. Gates are p of the chosen expert, with `renormalise` divided by the sum over a token's
choices or over its kept ones. Choices queue at their expert by rank first (all first choices before
any second ones, as GShard has it), then by position or by random numbers; the first C find room,
C = max(ceil(T / E * capacity_factor), min_capacity) for T tokens. The kept ones stand in the order
(rank, token), `encfast.routing.Routing` says where. Rows outside of `mask` are no tokens: they
take no room, count for nothing and have expert -1. Experts without a token, all tokens at one, no
tokens, E = 1 and top_k = E are legal. NaN counts as the smallest logit: a row of nothing else goes
to the lowest ids, and its gates alone are NaN.

Every shape is known beforehand; how many rows an expert has stays on the device. Random numbers are
functions of `rng` and the place they are for (`encfast.ref.moe_noise`), and numbers that decide
come without a rounding that could differ: choices are the same on every device.

Sources: Shazeer et al. (arXiv:1701.06538), GShard (arXiv:2006.16668), Switch (arXiv:2101.03961),
DeepSpeed-MoE (arXiv:2201.05596) with its jitter, noise and random token selection, Mixtral
(arXiv:2401.04088) for `renormalise`, DeepSeek-V3 (arXiv:2412.19437) for sigmoid scores.

Backends: C++ on the CPU and CUDA; elsewhere the reference.
"""

import torch
from torch import Tensor

from ..ref.moe_route import moe_jitter as _ref_jitter
from ..ref.moe_route import moe_permute as _ref_permute
from ..ref.moe_route import moe_route as _ref_route
from ..ref.moe_route import moe_route_bwd as _ref_route_bwd
from ..ref.moe_route import moe_unpermute as _ref_unpermute
from ..ref.moe_route import moe_unpermute_bwd as _ref_unpermute_bwd
from ..ref.moe_route import sort_choices as _ref_sort
from ..routing import Routing
from . import _backends
from ._checks import FLOAT_DTYPES, check_dtype, check_tensor
from ._moe_route_checks import (
    check_expert_ids,
    check_gates,
    check_permute,
    check_rng,
    check_route,
)

DISPATCHER_OPS = (
    "moe_route",
    "moe_route_bwd",
    "moe_sort",
    "moe_permute",
    "moe_unpermute",
    "moe_unpermute_bwd",
    "moe_jitter",
)

_RULE = "str scoring, str renormalise"
for _signature in (
    f"moe_route(Tensor logits, Tensor? mask, SymInt top_k, {_RULE}, float? capacity_factor, "
    "SymInt min_capacity, str priority, str? noise, Tensor? rng) -> (Tensor gates, "
    "Tensor expert_ids, Tensor rows, Tensor slots, Tensor cu_seqlens, Tensor probabilities)",
    "moe_route_bwd(Tensor? dgates, Tensor? dprobabilities, Tensor probabilities, "
    f"Tensor expert_ids, Tensor slots, {_RULE}, ScalarType dtype) -> Tensor",
    "moe_sort(Tensor expert_ids, SymInt num_experts) "
    "-> (Tensor rows, Tensor slots, Tensor cu_seqlens)",
    # rows and slots say the same; each direction reads one and its gradient the other.
    "moe_permute(Tensor x, Tensor rows, Tensor slots) -> Tensor",
    "moe_unpermute(Tensor y, Tensor? gates, Tensor rows, Tensor slots) -> Tensor",
    "moe_unpermute_bwd(Tensor dout, Tensor y, Tensor gates, Tensor rows, Tensor slots) "
    "-> (Tensor dy, Tensor dgates)",
    "moe_jitter(Tensor x, Tensor rng, float amount) -> Tensor",
):
    _name, _, _arguments = _signature.partition("(")
    torch.library.define(f"encfast::{_name}", f"({_arguments}", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("encfast::moe_route")
def _fake_route(
    logits, mask, top_k, scoring, renormalise, capacity_factor, min_capacity, priority, noise, rng
):
    n, experts = logits.shape
    return (
        logits.new_empty((n, top_k), dtype=torch.float32),
        logits.new_empty((n, top_k), dtype=torch.int32),
        logits.new_empty(n * top_k, dtype=torch.int32),
        logits.new_empty((n, top_k), dtype=torch.int32),
        logits.new_empty(experts + 1, dtype=torch.int32),
        logits.new_empty((n, experts), dtype=torch.float32),
    )


@torch.library.register_fake("encfast::moe_route_bwd")
def _fake_route_bwd(
    dgates, dprobabilities, probabilities, expert_ids, slots, scoring, renormalise, dtype
):
    return probabilities.new_empty(probabilities.shape, dtype=dtype)


@torch.library.register_fake("encfast::moe_sort")
def _fake_sort(expert_ids, num_experts):
    return (
        expert_ids.new_empty(expert_ids.shape[0] * expert_ids.shape[1]),
        expert_ids.new_empty(expert_ids.shape),
        expert_ids.new_empty(num_experts + 1),
    )


@torch.library.register_fake("encfast::moe_permute")
def _fake_permute(x, rows, slots):
    return x.new_empty((rows.shape[0], x.shape[1]))


@torch.library.register_fake("encfast::moe_unpermute")
def _fake_unpermute(y, gates, rows, slots):
    return y.new_empty((slots.shape[0], y.shape[1]))


@torch.library.register_fake("encfast::moe_unpermute_bwd")
def _fake_unpermute_bwd(dout, y, gates, rows, slots):
    return y.new_empty(y.shape), y.new_empty(slots.shape, dtype=torch.float32)


@torch.library.register_fake("encfast::moe_jitter")
def _fake_jitter(x, rng, amount):
    return x.new_empty(x.shape)


def _setup_route(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    _, expert_ids, _, slots, _, probabilities = output
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(probabilities, expert_ids, slots)
        ctx.rule, ctx.dtype = inputs[3:5], inputs[0].dtype


def _route_backward(ctx, dgates, dids, drows, dslots, dcu_seqlens, dprobabilities):
    dlogits = None
    if dgates is not None or dprobabilities is not None:
        dlogits = torch.ops.encfast.moe_route_bwd(
            dgates, dprobabilities, *ctx.saved_tensors, *ctx.rule, ctx.dtype
        )
    return dlogits, *[None] * 9


def _setup_permute(ctx, inputs, output) -> None:
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(*inputs[1:])


def _permute_backward(ctx, dout):
    return torch.ops.encfast.moe_unpermute(dout, None, *ctx.saved_tensors), None, None


def _setup_unpermute(ctx, inputs, output) -> None:
    y, gates, rows, slots = inputs
    if any(ctx.needs_input_grad[:2]):
        ctx.save_for_backward(None if gates is None else y, gates, rows, slots)


def _unpermute_backward(ctx, dout):
    y, gates, rows, slots = ctx.saved_tensors
    if gates is None:
        return torch.ops.encfast.moe_permute(dout, rows, slots), None, None, None
    dy, dgates = torch.ops.encfast.moe_unpermute_bwd(dout, y, gates, rows, slots)
    need_y, need_gates, _, _ = ctx.needs_input_grad
    return dy if need_y else None, dgates if need_gates else None, None, None


def _setup_jitter(ctx, inputs, output) -> None:
    _, rng, ctx.amount = inputs
    ctx.save_for_backward(rng)


def _jitter_backward(ctx, dout):
    (rng,) = ctx.saved_tensors
    return torch.ops.encfast.moe_jitter(dout, rng, ctx.amount), None, None


def _no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "moe_route: double backward through gates is not implemented; encfast.ref.moe_route has one"
    )


for _name, _backward, _setup in (
    ("moe_route", _route_backward, _setup_route),
    ("moe_permute", _permute_backward, _setup_permute),
    ("moe_unpermute", _unpermute_backward, _setup_unpermute),
    ("moe_jitter", _jitter_backward, _setup_jitter),
    ("moe_route_bwd", _no_double_backward, lambda ctx, inputs, output: None),
    ("moe_unpermute_bwd", _no_double_backward, lambda ctx, inputs, output: None),
):
    torch.library.register_autograd(f"encfast::{_name}", _backward, setup_context=_setup)


def _reference_route(*args):
    logits, rng = args[0], args[-1]
    check_route(*args[:-1])
    if _needs_rng(args[5], args[7], args[8]):
        check_rng("route_tokens", rng, "logits", logits)
    return _ref_route(*args)


def _reference_route_bwd(*args):
    return _ref_route_bwd(*args[:-1]).to(args[-1])


def _reference_sort(expert_ids, num_experts):
    check_expert_ids("sort_choices", expert_ids, num_experts)
    return _ref_sort(expert_ids, num_experts)


def _reference_permute(x, rows, slots):
    check_permute("permute_rows", "x", x, None, rows, slots)
    return _ref_permute(x, rows, slots.shape[1])


def _reference_unpermute(y, gates, rows, slots):
    check_permute("unpermute_rows", "y", y, rows.shape[0], rows, slots)
    if gates is not None:
        check_gates("unpermute_rows", gates, slots)
    return _ref_unpermute(y, gates, slots)


for _op, _reference in (
    ("moe_route", _reference_route),
    ("moe_route_bwd", _reference_route_bwd),
    ("moe_sort", _reference_sort),
    ("moe_permute", _reference_permute),
    ("moe_unpermute", _reference_unpermute),
    ("moe_unpermute_bwd", _ref_unpermute_bwd),
    ("moe_jitter", _ref_jitter),
):
    _backends.register_reference("moe_route", _op, _reference)
    _backends.register_cuda("moe_route", _op, _reference)


def _needs_rng(capacity_factor: float | None, priority: str, noise: str | None) -> bool:
    return noise is not None or (capacity_factor is not None and priority == "random")


def _drawn(device: torch.device) -> Tensor:
    return torch.randint(0, 2**32, (2,), dtype=torch.int64, device=device)


def route_tokens(
    logits: Tensor,
    top_k: int,
    *,
    mask: Tensor | None = None,
    scoring: str = "softmax",
    renormalise: bool | str = False,
    capacity_factor: float | None = None,
    min_capacity: int = 0,
    priority: str = "position",
    noise: str | None = None,
    rng: Tensor | None = None,
) -> Routing:
    """Chooses experts for the tokens of a batch and sorts the choices by expert.

    Args:
        logits: [N, E] float32, bfloat16 or float16: the router's, any strides.
        top_k: experts of a token, K in 1..E.
        mask: bool [N], False where a row is padding; all rows are tokens by default.
        scoring: "softmax" over all experts, or "sigmoid" of each.
        renormalise: gates of a token sum to 1 over its choices (True or "chosen": a dropped one
            leaves its share unused), or over its kept ones ("kept").
        capacity_factor: room of an expert in units of T / E, more than 0; None drops nothing. T
            counts tokens and not choices: GShard's top-2 doubles the factor itself.
        min_capacity: room of an expert at least.
        priority: who finds room among choices of equal rank: those first in the batch
            ("position"), or a uniformly random set ("random").
        noise: Gumbel noise on the ranking of all choices ("gumbel"), or of all but the first
            ("gumbel_rest"); none by default.
        rng: int64 [2], the key of all random numbers; drawn from PyTorch's generator where it is
            needed and None, so that torch.manual_seed repeats a step.

    Returns:
        Routing. Its gates and probabilities are differentiable in logits.

    Raises:
        TypeError, ValueError: a malformed argument, a top_k above E, a capacity_factor of 0 or
            less, or NaN in the logits of a token.

    Numerics: float32. Choices and places are exact, and equal for any number of threads.

    Examples:
        >>> routing = ops.route_tokens(torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]]), 2)
        >>> routing.expert_ids
        tensor([[1, 2],
                [0, 2]], dtype=torch.int32)
        >>> routing.cu_seqlens  # where the rows of each expert begin
        tensor([0, 1, 2, 4], dtype=torch.int32)
    """
    rule = renormalise
    if not isinstance(rule, str):
        rule = "chosen" if rule else "none"
    args = scoring, rule, capacity_factor, min_capacity, priority, noise
    check_route(logits, mask, top_k, *args)
    if rng is not None:
        check_rng("route_tokens", rng, "logits", logits)
    elif _needs_rng(capacity_factor, priority, noise):
        rng = _drawn(logits.device)
    return Routing(*torch.ops.encfast.moe_route(logits, mask, top_k, *args, rng))


def sort_choices(expert_ids: Tensor, gates: Tensor, num_experts: int) -> Routing:
    """The routing of given choices, none dropped: hash layers, or choices kept from a first pass.

    Args:
        expert_ids: int32 [N, K] in 0..E - 1, or -1 for no choice.
        gates: float32 [N, K]: what each choice weighs, 0 beside -1.
        num_experts: E.

    Returns:
        The routing, without probabilities.

    Raises:
        TypeError, ValueError: a malformed argument, or an id out of range.

    Examples:
        >>> ids = torch.tensor([[1], [0], [1]], dtype=torch.int32)
        >>> ops.sort_choices(ids, torch.ones(3, 1), 2).rows
        tensor([1, 0, 2], dtype=torch.int32)
    """
    check_expert_ids("sort_choices", expert_ids, num_experts)
    check_gates("sort_choices", gates, expert_ids)
    places = torch.ops.encfast.moe_sort(expert_ids, num_experts)
    return Routing(gates, expert_ids, *places)


def permute_rows(x: Tensor, routing: Routing) -> Tensor:
    """Rows of the tokens, expert by expert, as grouped products take them.

    Args:
        x: [N, C] float32, bfloat16 or float16; rows any distance apart.
        routing: of these N tokens.

    Returns:
        [N * K, C]: `routing.cu_seqlens` says which rows are whose; those behind them are 0.
        Differentiable in x, any number of times.

    Raises:
        TypeError, ValueError: a malformed argument.

    Numerics: a copy. The gradient sums a token's rows in float32, first choice first, rounded once.

    Examples:
        >>> routing = ops.route_tokens(torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, 1.0]]), 1)
        >>> ops.permute_rows(torch.tensor([[10.0], [20.0], [30.0]]), routing)
        tensor([[20.],
                [10.],
                [30.]])
        >>> routing.cu_seqlens
        tensor([0, 1, 3], dtype=torch.int32)
    """
    check_permute("permute_rows", "x", x, None, routing.rows, routing.slots)
    return torch.ops.encfast.moe_permute(x, routing.rows, routing.slots)


def unpermute_rows(y: Tensor, routing: Routing, *, gates: Tensor | None = None) -> Tensor:
    """The experts' rows back at their tokens, weighted and summed.

    Args:
        y: [N * K, C] float32, bfloat16 or float16, in the order of `permute_rows`.
        routing: the one the rows were permuted by.
        gates: float32 [N, K] in place of `routing.gates`.

    Returns:
        [N, C] in y's dtype; 0 for a token whose choices were all dropped. Differentiable in y and
        the gates.

    Raises:
        TypeError, ValueError: a malformed argument.

    Numerics: float32 inside, first choice first, rounded once. The gradient of a gate is the
    product of two rows, summed in float32; no atomics, equal for any number of threads.

    Examples:
        >>> routing = ops.route_tokens(torch.randn(5, 3), 2, renormalise=True)
        >>> x = torch.randn(5, 4)
        >>> y = ops.permute_rows(x, routing)  # experts that change nothing
        >>> torch.allclose(ops.unpermute_rows(y, routing), x, atol=1e-6)
        True
    """
    weights = routing.gates if gates is None else gates
    check_permute("unpermute_rows", "y", y, routing.rows.shape[0], routing.rows, routing.slots)
    check_gates("unpermute_rows", weights, routing.slots)
    return torch.ops.encfast.moe_unpermute(y, weights, routing.rows, routing.slots)


def jitter_rows(x: Tensor, amount: float, *, rng: Tensor | None = None) -> Tensor:
    """A router's input times uniform random numbers close to 1: Switch's and DeepSpeed's jitter.

    Args:
        x: [N, C] float32, bfloat16 or float16.
        amount: numbers lie in (1 - amount, 1 + amount); 0 <= amount < 1. Published: 0.01.
        rng: int64 [2]; drawn from PyTorch's generator by default.

    Returns:
        [N, C] in x's dtype. Differentiable in x, any number of times, by the same numbers.

    Raises:
        TypeError, ValueError: a malformed argument.

    Examples:
        >>> x = torch.ones(2, 3)
        >>> bool(((ops.jitter_rows(x, 0.01) - x).abs() <= 0.01).all())
        True
    """
    op = "jitter_rows"
    check_tensor(op, "x", x, 2, "[N, C]")
    check_dtype(op, "x", x, *FLOAT_DTYPES)
    if not 0 <= amount < 1:
        raise ValueError(f"{op}: amount is {amount}, expected 0 <= amount < 1")
    if rng is None:
        rng = _drawn(x.device)
    check_rng(op, rng, "x", x)
    return torch.ops.encfast.moe_jitter(x, rng, amount)


def backends() -> dict[str, str]:
    """Device type -> 'native', or 'reference: why'."""
    return _backends.describe(DISPATCHER_OPS)
