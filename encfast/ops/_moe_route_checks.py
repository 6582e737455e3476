"""Argument checks of `encfast.ops.moe_route`."""

import torch

from ._checks import (
    FLOAT_DTYPES,
    assert_on_device,
    can_assert_values,
    can_read_values,
    check_device,
    check_dtype,
    check_range,
    check_tensor,
)

SCORINGS = ("softmax", "sigmoid")
RENORMALISE = ("none", "chosen", "kept")
PRIORITIES = ("position", "random")
NOISES = ("gumbel", "gumbel_rest")


def is_int(x: object) -> bool:
    return isinstance(x, int | torch.SymInt) and not isinstance(x, bool)


def _check_word(name: str, value: object, words: tuple[str, ...]) -> None:
    if value not in words:
        expected = ", ".join(repr(w) for w in words)
        raise ValueError(f"route_tokens: {name} is {value!r}, expected one of {expected}")


def check_rng(op, rng, like_name, like) -> None:
    check_tensor(op, "rng", rng, 1, "[2]")
    check_dtype(op, "rng", rng, torch.int64)
    check_device(op, "rng", rng, like_name, like)
    if rng.shape[0] != 2:
        raise ValueError(f"{op}: rng has shape {tuple(rng.shape)}, expected (2,)")


def check_top_k(op, top_k, experts) -> None:
    if not is_int(top_k):
        raise TypeError(f"{op}: top_k is {type(top_k).__name__}, expected an int")
    if not 1 <= top_k <= experts:
        raise ValueError(f"{op}: top_k is {top_k}, expected 1..{experts}, the number of experts")


def check_logits(op, logits, mask) -> None:
    check_tensor(op, "logits", logits, 2, "[N, E]")
    check_dtype(op, "logits", logits, *FLOAT_DTYPES, hint="; for float64 use encfast.ref.moe_route")
    if logits.shape[1] < 1:
        raise ValueError(f"{op}: logits has shape {tuple(logits.shape)}, expected E >= 1 experts")
    if mask is not None:
        check_tensor(op, "mask", mask, 1, "[N]")
        check_dtype(op, "mask", mask, torch.bool, hint=", True for tokens")
        check_device(op, "mask", mask, "logits", logits)
        if mask.shape[0] != logits.shape[0]:
            raise ValueError(
                f"{op}: mask has {mask.shape[0]} entries, logits has {logits.shape[0]} rows"
            )


def check_route(
    logits, mask, top_k, scoring, renormalise, capacity_factor, min_capacity, priority, noise
) -> None:
    op = "route_tokens"
    check_logits(op, logits, mask)
    check_top_k(op, top_k, logits.shape[1])
    _check_word("scoring", scoring, SCORINGS)
    _check_word("renormalise", renormalise, RENORMALISE)
    _check_word("priority", priority, PRIORITIES)
    if noise is not None:
        _check_word("noise", noise, NOISES)
    if capacity_factor is not None and not capacity_factor > 0:
        raise ValueError(
            f"{op}: capacity_factor is {capacity_factor}, expected more than 0, or None to keep "
            "every choice"
        )
    if not is_int(min_capacity) or min_capacity < 0:
        raise ValueError(f"{op}: min_capacity is {min_capacity}, expected an int >= 0")
    # Of symbols this would be a guard; the kernel checks it again.
    if not torch.compiler.is_compiling() and logits.shape[0] * top_k >= 2**31:
        raise ValueError(
            f"{op}: logits has {logits.shape[0]} rows of {top_k} choices, expected fewer than 2^31"
        )
    _check_no_nan(op, logits, mask)


def _check_no_nan(op, logits, mask) -> None:
    if can_read_values(logits):
        # The largest number tells at a tenth of the price whether there is any NaN.
        if not logits.numel() or not logits.detach().max().isnan():
            return
        bad = logits.detach().isnan().any(1)
        bad = bad if mask is None else bad & mask
        if bad.any():
            raise ValueError(
                f"{op}: logits holds NaN in row {int(bad.nonzero()[0])}, expected numbers"
            )
    elif can_assert_values(logits):
        bad = logits.isnan().any(1)
        assert_on_device(~(bad if mask is None else bad & mask), f"{op}: logits holds NaN")


def check_expert_ids(op, expert_ids, experts) -> None:
    check_tensor(op, "expert_ids", expert_ids, 2, "[N, K]")
    check_dtype(op, "expert_ids", expert_ids, torch.int32)
    if not is_int(experts) or experts < 1:
        raise ValueError(f"{op}: num_experts is {experts}, expected an int >= 1")
    check_range(op, "expert_ids", expert_ids, -1, experts, lambda: f"expected -1 <= id < {experts}")


def check_gates(op, gates, slots) -> None:
    check_tensor(op, "gates", gates, 2, "[N, K]")
    check_dtype(op, "gates", gates, torch.float32)
    check_device(op, "gates", gates, "slots", slots)
    if gates.shape != slots.shape:
        raise ValueError(
            f"{op}: gates has shape {tuple(gates.shape)}, expected {tuple(slots.shape)}, a weight "
            "for each choice"
        )


def check_places(op, rows, slots, like_name, like) -> None:
    check_tensor(op, "slots", slots, 2, "[N, K]")
    check_tensor(op, "rows", rows, 1, "[N * K]")
    for name, x in (("slots", slots), ("rows", rows)):
        check_dtype(op, name, x, torch.int32)
        check_device(op, name, x, like_name, like)
    choices = slots.shape[0] * slots.shape[1]
    if rows.shape[0] != choices:
        raise ValueError(
            f"{op}: rows has {rows.shape[0]} entries, expected {choices}, as slots "
            f"{tuple(slots.shape)} has"
        )
    for name, x in (("slots", slots), ("rows", rows)):
        check_range(op, name, x, -1, choices, lambda: f"expected -1 <= place < {choices}")


def check_permute(op, name, x, count, rows, slots) -> None:
    """x [count, C] of a routing; count None: one row a token."""
    shape = "[N, C]" if count is None else "[N * K, C]"
    check_tensor(op, name, x, 2, shape)
    check_dtype(op, name, x, *FLOAT_DTYPES, hint="; for float64 use encfast.ref.moe_route")
    check_places(op, rows, slots, name, x)
    expected = slots.shape[0] if count is None else count
    if x.shape[0] != expected:
        raise ValueError(f"{op}: {name} has {x.shape[0]} rows, expected {expected}, {shape}")
