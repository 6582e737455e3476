"""linear_cross_entropy in eager training on the CPU: logits in the memory of the weight's gradient.

That gradient [V, C] is the largest tensor of the call, and nothing stands in its memory before the
backward. Taken already by the forward it holds the logits, which the gradient then replaces
(`_vocab_slices` says why in time): with M <= C rows to predict none is computed twice, and beside
the gradient there is only one slice.
"""

import itertools

import torch
from torch import Tensor

from . import _backends
from . import _linear_cross_entropy_cpu as _cpu
from ._checks import check_device, check_dtype, check_tensor
from ._linear_cross_entropy_checks import check_floats, check_operands

# Neither has an autograd formula or a kernel beside the CPU's. `memory` is like the weight,
# contiguous: it holds logits after the first, the gradient of the weight after the second.
torch.library.define(
    "encfast::linear_cross_entropy_in_place",
    "(Tensor x, Tensor weight, Tensor targets, Tensor? bias, Tensor? rows, int ignore_index, "
    "float? label_smoothing, float? z_loss, float? softcap, Tensor(a!) memory) "
    "-> (Tensor loss, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "encfast::linear_cross_entropy_in_place_bwd",
    "(Tensor dloss, Tensor x, Tensor weight, Tensor targets, Tensor? bias, Tensor? rows, "
    "Tensor lse, int ignore_index, float? label_smoothing, float? z_loss, float? softcap, "
    "Tensor(a!) memory, bool want_dx, bool want_dbias) -> (Tensor dx, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("encfast::linear_cross_entropy_in_place")
def _fake_fwd(x, weight, targets, *options):
    loss, lse = (x.new_empty(targets.shape, dtype=torch.float32) for _ in range(2))
    return loss, lse


@torch.library.register_fake("encfast::linear_cross_entropy_in_place_bwd")
def _fake_bwd(dloss, x, weight, *options):
    want_dx, want_dbias = options[-2:]
    dbias = x.new_empty(weight.shape[0] if want_dbias else 0, dtype=torch.float32)
    return x.new_empty(x.shape if want_dx else 0), dbias


def _cpu_fwd(x, weight, targets, bias, rows, *options_and_memory):
    *options, memory = options_and_memory
    check_operands(x, weight, targets, bias, rows, *options)
    _check_memory("linear_cross_entropy_in_place", weight, memory)
    return _cpu.forward(x, weight, targets, bias, rows, *options, kept=memory)


def _cpu_bwd(dloss, x, weight, targets, bias, rows, lse, *options_and_wanted):
    *options, memory, want_dx, want_dbias = options_and_wanted
    op, m = "linear_cross_entropy_in_place_bwd", targets.shape[0]
    check_operands(x, weight, targets, bias, rows, *options)
    check_floats(op, "dloss", dloss, (m,))
    check_floats(op, "lse", lse, (m,))
    _check_memory(op, weight, memory)
    operands = dloss, x, weight, targets, bias, rows, lse
    return _cpu.backward(
        *operands, memory, *options, dweight=memory, want_dx=want_dx, want_dbias=want_dbias
    )


def _check_memory(op: str, weight: Tensor, memory: Tensor) -> None:
    check_tensor(op, "memory", memory, 2, "[V, C]")
    check_dtype(op, "memory", memory, weight.dtype, hint=", the dtype of weight")
    check_device(op, "memory", memory, "weight", weight)
    if memory.shape != weight.shape or not memory.is_contiguous():
        raise ValueError(
            f"{op}: memory has shape {tuple(memory.shape)} and strides {memory.stride()}, expected "
            f"{tuple(weight.shape)}, contiguous"
        )


_backends.register_around("vocab_scan", "linear_cross_entropy_in_place", _cpu_fwd)
_backends.register_around("vocab_grad", "linear_cross_entropy_in_place_bwd", _cpu_bwd)


def is_for(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether a call with these tensors may run in place: on the CPU, for plain autograd.

    It must want the gradient of the weight. Whoever traces or watches ops gets the functional op,
    which has rules for that: compilers and exporters, modes (selective checkpoints, counters,
    `exportable`) and tensors of other types (fake ones, DTensor).
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    tensors = (x, weight, *(t for t in others if t is not None))
    if any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):
        return False
    if x.device.type != "cpu" or not (torch.is_grad_enabled() and weight.requires_grad):
        return False
    return _backends.served_by("linear_cross_entropy_in_place", "cpu") == "native"


def new_memory(weight: Tensor) -> Tensor:
    """[V, C] for logits, then for the gradient; in pages of the usual size.

    Large ones (`vocab_weight_grad`) would save faults, but cost several times as much on a virtual
    machine that has handed them back to its host since the last step (bench/results/NOTES.md).
    """
    return weight.new_empty(weight.shape)


class InPlace(torch.autograd.Function):
    """(x, weight, targets, bias, rows, options of the op) -> loss [M]."""

    @staticmethod
    def forward(ctx, x, weight, targets, bias, rows, *options):
        memory = new_memory(weight)
        operands = x, weight, targets, bias, rows
        loss, lse = torch.ops.encfast.linear_cross_entropy_in_place(*operands, *options, memory)
        ctx.save_for_backward(*operands, lse, memory)
        ctx.options = options
        ctx.backwards = itertools.count()
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        if dloss is None:
            return (None,) * 9
        *operands, lse, memory = ctx.saved_tensors
        need_x, need_weight, _, need_bias, *_ = ctx.needs_input_grad
        given = dloss, *operands, lse
        recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
        # The first backward leaves its gradient where the logits were, and others may hold that as
        # W.grad. The next one, and one that is recorded itself, compute all logits again.
        if need_weight and not recorded and next(ctx.backwards) == 0:
            # Of a version of its own: the saved tensor may be unpacked once more.
            dweight = memory.data
            dx, dbias = torch.ops.encfast.linear_cross_entropy_in_place_bwd(
                *given, *ctx.options, dweight, need_x, need_bias
            )
        else:
            wanted = need_x, need_weight, need_bias
            dx, dweight, dbias = torch.ops.encfast.linear_cross_entropy_bwd(
                *given, lse.new_empty(0), *ctx.options, *wanted
            )
        bias = operands[3]
        return (
            dx if need_x else None,
            dweight if need_weight else None,
            None,
            dbias.to(bias.dtype) if need_bias else None,
            *(None,) * 5,
        )
