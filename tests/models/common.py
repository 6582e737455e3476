"""What every model must pass, as functions; each test file brings its model and its batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch._dynamo.testing
from torch import Tensor, nn

from encfast import PackedBatch
from encfast.weights import Tied

# B, N, S >= 2 everywhere, as smaller ones specialise a graph of their own; each with an empty
# sequence, and long enough that masking leaves two rows or more.
SIX_SHAPES = (
    [40, 0, 25],
    [20, 60, 0, 33],
    [0, 90],
    [31, 30, 0, 10, 47],
    [64, 0, 21],
    [1, 0, 48, 37, 2, 50],
)


def random_tokens(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> PackedBatch:
    """Ids in [0, V) for sequences of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (sum(lengths),), generator=generator)
    return PackedBatch.from_lengths(ids, list(lengths))


def ragged_lengths(count: int, longest: int = 300, seed: int = 0) -> list[int]:
    """1, `longest` and `count - 2` lengths between them."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randint(2, longest, (count - 2,), generator=generator).tolist()
    return [1, *middle[: count // 2], longest, *middle[count // 2 :]]


def assert_parity(name: str, actual: Tensor, reference: Tensor, tolerance: float = 1e-5) -> None:
    """max |actual - reference| <= tolerance * max |reference|, and neither is all zero nor NaN."""
    assert actual.shape == reference.shape, f"{name}: {actual.shape}, expected {reference.shape}"
    actual, reference = actual.detach().double(), reference.detach().double()
    scale = reference.abs().max().item()
    assert scale > 0, f"{name}: the reference is all zero, it proves nothing"
    error = (actual - reference).abs().max().item() / scale
    assert error <= tolerance, f"{name}: max abs difference / max abs reference = {error:.2e}"


def assert_gradient_parity(
    model: nn.Module,
    theirs: nn.Module,
    entries: Sequence[Tied],
    *,
    vanishing: Sequence[str] = (),
    tolerance: float = 1e-5,
) -> None:
    """Every gradient of ours against that of the tensors it is made of elsewhere.

    Compared in our layout: the gradient of a key bias alone is zero but for rounding, that of the
    fused q, k, v bias is not.

    Args:
        vanishing: parameters of ours whose gradient is zero in exact arithmetic (a bias in front of
            a softmax): it must be below tolerance times the largest gradient of all.
    """
    grads = {n: p.grad for n, p in theirs.named_parameters(remove_duplicate=False)}
    ours = dict(model.named_parameters(remove_duplicate=False))
    largest = max(g.abs().max().item() for g in grads.values() if g is not None)
    compared = set()
    for entry in entries:
        reference = {n: grads[n] for n in entry.theirs}
        if any(g is None for g in reference.values()):
            assert ours[entry.ours].grad is None, f"{entry.ours} has a gradient, theirs has none"
            continue
        grad = ours[entry.ours].grad
        assert grad is not None, f"{entry.ours} has no gradient"
        compared.add(id(ours[entry.ours]))
        if entry.ours in vanishing:
            assert grad.abs().max() <= tolerance * largest, f"gradient of {entry.ours}: {grad}"
            continue
        assert_parity(f"gradient of {entry.ours}", grad, entry.join(reference), tolerance)
    missed = [n for n, p in ours.items() if p.grad is not None and id(p) not in compared]
    assert not missed, f"gradients without a counterpart: {missed}"


def total_loss(model: nn.Module, batch: Any) -> Tensor:
    """`model.loss(batch).total`, what a training step differentiates."""
    return model.loss(batch).total


def assert_compiles(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    call: Callable[[nn.Module, Any], Tensor] = total_loss,
    backend: str = "aot_eager",
    max_graphs: int = 2,
    tolerance: float = 1e-5,
) -> None:
    """Forward and backward compile without a break, in few graphs, and compute what eager computes.

    The gradient of a bias on keys alone is zero but for rounding, which is another in a graph: it
    moves all scores of a query by as much.

    Args:
        model: in the mode to be tested; every pass starts from one seed.
        batches: of different ragged shapes, each with an empty sequence; see `SIX_SHAPES`.
        call: a scalar of model and batch.
        backend: "aot_eager" traces and differentiates everything; "inductor" also generates code.
        max_graphs: most graphs over all batches.
        tolerance: relative, for values and gradients.
    """
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    for i, batch in enumerate(batches):
        expected, expected_grads = _value_and_grads(call, model, batch)
        actual, grads = _value_and_grads(compiled, model, batch)
        assert_parity(f"value of batch {i}", actual, expected, tolerance)
        largest = max(g.abs().max().item() for g in expected_grads.values())
        for name, reference in expected_grads.items():
            if name.endswith(".k.bias"):
                assert max(g.abs().max() for g in (grads[name], reference)) <= tolerance * largest
            elif reference.any():
                what = f"batch {i}, gradient of {name}"
                assert_parity(what, grads[name], reference, 10 * tolerance)
    graphs = counter.frame_count
    assert graphs <= max_graphs, f"{graphs} graphs, expected <= {max_graphs}"


def _value_and_grads(
    call: Callable[[nn.Module, Any], Tensor], model: nn.Module, batch: Any
) -> tuple[Tensor, Mapping[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    value = call(model, batch)
    value.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return value.detach(), grads


def assert_no_leak(
    model: nn.Module,
    rows: Callable[[PackedBatch], Tensor],
    *,
    vocab_size: int,
    lengths: Sequence[int] = (7, 0, 12, 5),
    watched: int = 2,
    tolerance: float = 1e-5,
) -> None:
    """One sequence sees nothing of its neighbours, in the forward and in the backward.

    Other tokens of equal length around it leave its outputs, and the gradients of a loss on them
    with respect to its embedded tokens, bit-equal; other lengths change the shape of the matmuls,
    hence the last bits.

    Args:
        model: in evaluation mode, with `get_input_embeddings`.
        rows: token batch -> `[N, ...]`, one output per token.
        vocab_size: V.
        lengths: of the sequences.
        watched: index of the sequence that must not change.
        tolerance: relative, for neighbours of another length.
    """
    tokens = random_tokens(lengths, vocab_size)
    own = tokens.split()[watched]
    before = _watched(model, rows, tokens, watched)
    for shift, same_length in ((0, True), (3, False)):
        others = random_tokens([n + shift if n else 0 for n in lengths], vocab_size, seed=1).split()
        changed = PackedBatch.from_list([own if b == watched else t for b, t in enumerate(others)])
        after = _watched(model, rows, changed, watched)
        for name, a, b in zip(("output", "input gradient"), after, before, strict=True):
            bound = 0.0 if same_length else tolerance
            assert_parity(f"{name} beside other neighbours", a, b, bound)


def _watched(
    model: nn.Module, rows: Callable[[PackedBatch], Tensor], tokens: PackedBatch, watched: int
) -> tuple[Tensor, Tensor]:
    """Outputs of one sequence, and the gradient of their weighted sum at its embedded tokens."""
    embedded: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        out = rows(tokens).split(tokens.lengths().tolist())[watched]
    finally:
        handle.remove()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weights).sum().backward()
    grads = embedded[0].grad.split(tokens.lengths().tolist())
    for b, grad in enumerate(grads):
        assert b == watched or not grad.any(), f"sequence {b} takes a gradient from {watched}"
    return out.detach(), grads[watched]
