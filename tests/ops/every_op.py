"""Every op once against its reference, forward and backward, where only encfast is installed.

    python tests/ops/every_op.py

ends with what encfast.info says, as JSON. The tests of wheels run it in environments of their own;
it has no pytest at hand and takes encfast from where it is installed.
"""

import json
import os

os.environ["ENCFAST_REQUIRE_NATIVE"] = "1"  # the reference may not stand in for a kernel

import torch
from row_cases import BF16, FP32, assert_same

from encfast import info, ops, ref
from encfast.testing import assert_close_to_reference

DONE = {}


def check(stem, f, reference, inputs, out_shape):
    """Results and the gradients of all `inputs` in fp32, by the tolerance rule."""
    assert ops.backends(stem)["cpu"] == "native", ops.backends(stem)
    assert_same(f, reference, reference, inputs, [torch.randn(out_shape)])
    DONE[stem] = "forward and backward"


def check_varlen_attn():
    cu_seqlens = torch.tensor([0, 17, 17, 60], dtype=torch.int32)
    inputs = {name: torch.randn(60, 3, 32) for name in "qkv"}
    check(
        "varlen_attn",
        lambda q, k, v: ops.varlen_attn(q, k, v, cu_seqlens, max_seqlen_q=43),
        lambda q, k, v: ref.varlen_attn(q, k, v, cu_seqlens)[0],
        inputs,
        (60, 3, 32),
    )


def check_pad():
    gather, scatter = torch.randperm(30)[:20], torch.randint(0, 12, (30,))
    x = {"x": torch.randn(30, 9)}
    check(
        "pad",
        lambda x: ops.gather_rows(x, gather),
        lambda x: ref.gather_rows(x, gather),
        x,
        (20, 9),
    )
    check(
        "pad",
        lambda x: ops.scatter_rows(x, scatter, 12),
        lambda x: ref.scatter_rows(x, scatter, 12),
        x,
        (12, 9),
    )
    mask = torch.rand(5, 11) < 0.6
    for found, expected in zip(ops.find_rows(mask), ref.find_rows(mask), strict=True):
        assert torch.equal(found, expected)


def check_rotary():
    angles, positions = torch.randn(40, 16), torch.randint(0, 40, (25,))
    cos, sin = angles.cos(), angles.sin()
    check(
        "rotary",
        lambda x: ops.rotary(x, cos, sin, positions),
        lambda x: ref.rotary(x, cos.to(x.dtype), sin.to(x.dtype), positions),
        {"x": torch.randn(25, 3, 32)},
        (25, 3, 32),
    )


def check_add_norm():
    inputs = {"x": torch.randn(33, 70), "residual": torch.randn(33, 70)}
    inputs |= {"weight": torch.rand(70) + 0.5, "bias": torch.randn(70)}
    check("add_norm", ops.add_norm, lambda **a: ref.add_norm(**a)[0], inputs, (33, 70))


def check_glu():
    inputs = {"x": torch.randn(33, 140), "bias": torch.randn(140)}
    check("glu", ops.glu, ref.glu, inputs, (33, 70))


def check_grouped_mm():
    cu_seqlens = torch.tensor([0, 17, 17, 58], dtype=torch.int32)
    inputs = {"x": torch.randn(60, 70), "weight": torch.randn(3, 40, 70) / 8}
    check(
        "grouped_mm",
        lambda x, weight, bias: ops.grouped_mm(x, weight, cu_seqlens, bias=bias),
        lambda x, weight, bias: ref.grouped_mm(x, weight, cu_seqlens, bias),
        inputs | {"bias": torch.randn(3, 40)},
        (60, 40),
    )


def check_rank_loss():
    positives = torch.randint(-1, 50, (40,))
    inputs = {"a": torch.randn(40, 30), "b": torch.randn(50, 30), "logit_scale": torch.tensor(2.0)}
    for loss in ("info_nce", "siglip"):
        check(
            "rank_loss",
            lambda loss=loss, **a: getattr(ops, loss)(**a, positives=positives),
            lambda loss=loss, **a: getattr(ref, loss)(**a, positives=positives),
            inputs,
            (),
        )


def check_partial_ranking():
    a, b, valid = torch.randn(40, 30), torch.randn(500, 30), torch.randint(0, 25, (40,))
    for rows in (b, b[:60]):  # gathered, and by products with all rows
        chosen = ops.hard_negatives(a, rows, 24)
        check(
            "partial_ranking",
            lambda chosen=chosen, **f: ops.partial_ranking(
                **f, candidates=chosen, valid=valid, reduction="none"
            ),
            lambda logit_scale, chosen=chosen, **f: ref.partial_ranking(
                ref.candidate_dots(**f, candidates=chosen), logit_scale, valid
            ),
            {"a": a, "b": rows, "logit_scale": torch.tensor(2.0)},
            (40,),
        )


def check_linear_cross_entropy():
    targets = torch.randint(0, 90, (40,)).where(torch.arange(40) % 3 > 0, -100)
    inputs = {"x": torch.randn(40, 30), "weight": torch.randn(90, 30) / 4, "bias": torch.randn(90)}
    check(
        "linear_cross_entropy",
        lambda **heads: ops.linear_cross_entropy(targets=targets, reduction="none", **heads),
        lambda **heads: ref.linear_cross_entropy(targets=targets, **heads)[0],
        inputs,
        (40,),
    )


def check_linear_kl():
    teacher_x, teacher_weight = torch.randn(40, 50), torch.randn(90, 50) / 5
    inputs = {"x": torch.randn(40, 30), "weight": torch.randn(90, 30) / 4, "bias": torch.randn(90)}

    def kl(op, **options):
        return lambda x, weight, bias: op(
            x, weight, teacher_x.to(x), teacher_weight.to(x), bias=bias, temperature=2.0, **options
        )

    reference = kl(ref.linear_kl)
    check(
        "linear_kl",
        kl(ops.linear_kl, reduction="none"),
        lambda **heads: reference(**heads)[0],
        inputs,
        (40,),
    )


def check_linear_seg_max():
    cu_seqlens = torch.tensor([0, 17, 17, 40], dtype=torch.int32)
    inputs = {"x": torch.randn(40, 30), "weight": torch.randn(90, 30) / 4, "bias": torch.randn(90)}
    check(
        "linear_seg_max",
        lambda **heads: ops.linear_seg_max(cu_seqlens=cu_seqlens, **heads),
        lambda **heads: ref.linear_seg_max(cu_seqlens=cu_seqlens, **heads)[0],
        inputs,
        (3, 90),
    )


def check_packed_linear():
    """Inference only: it has no backward."""
    assert ops.backends("packed_linear")["cpu"] == "native"
    x, weight, bias = torch.randn(37, 96), torch.randn(140, 96) / 10, torch.randn(140)
    for format in ("fp32", "bf16", "int8"):
        packed, ref_packed = ops.pack_linear(weight, format=format), ref.pack_linear(weight, format)
        operand = x.to(BF16 if format == "bf16" else FP32)
        options = {"format": format, "bias": bias, "activation": "gelu"}
        assert_close_to_reference(
            format,
            ops.packed_linear(operand, packed, 140, **options),
            ref.packed_linear(operand.double(), ref_packed, 140, **options),
            ref.packed_linear(operand, ref_packed, 140, **options),
        )
    DONE["packed_linear"] = "forward in fp32, bf16 and int8"


def check_patch_gather():
    noise = torch.rand(3, 24)
    counts = [24 * torch.arange(4, dtype=torch.int32), 6 * torch.arange(4, dtype=torch.int32)]
    for ordered in (True, False):
        chosen = ops.select_patches(noise, 6, ordered=ordered)
        expected = ref.select_patches(noise.flatten(), *counts, ordered)
        for found, right in zip(chosen[:3], expected, strict=True):
            assert torch.equal(found, right)
    scale, shift = torch.rand(2), torch.randn(2)
    check(
        "patch_gather",
        lambda image: ops.gather_patches(image, chosen.hidden, (3, 5), scale=scale, shift=shift),
        lambda image: ref.gather_patches(
            image, chosen.hidden, (3, 5), False, scale, shift, image.dtype
        ),
        {"image": torch.randn(3, 2, 12, 30)},
        (54, 30),
    )
    inputs = {"x": torch.randn(18, 70), "fill": torch.randn(70), "add": torch.randn(24, 70)}
    check(
        "patch_gather",
        lambda x, fill, add: ops.restore_rows(x, chosen.restore, fill, add=add),
        lambda x, fill, add: ref.restore_rows(x, chosen.restore, fill, add),
        inputs,
        (72, 70),
    )


def check_moe_route():
    logits, kept = torch.randn(60, 7), {}

    def route(logits):
        routing = ops.route_tokens(logits, 2, capacity_factor=1.5, renormalise="kept")
        kept["routing"] = routing
        return routing.gates

    def reference(logits):
        return ref.moe_route(logits, None, 2, "softmax", "kept", 1.5)[0]

    check("moe_route", route, reference, {"logits": logits}, (60, 2))
    routing, expected = kept["routing"], ref.moe_route(logits, None, 2, "softmax", "kept", 1.5)
    for found, right in zip((routing.rows, routing.slots), expected[2:4], strict=True):
        assert torch.equal(found, right)
    check(
        "moe_route",
        lambda x: ops.permute_rows(x, routing),
        lambda x: ref.moe_permute(x, routing.rows, 2),
        {"x": torch.randn(60, 70)},
        (120, 70),
    )
    check(
        "moe_route",
        lambda y, gates: ops.unpermute_rows(y, routing, gates=gates),
        lambda y, gates: ref.moe_unpermute(y, gates, routing.slots),
        {"y": torch.randn(120, 70), "gates": torch.rand(60, 2)},
        (60, 70),
    )


def check_seg_pool():
    # Short segments: of a long one's largest values most gradients are 0.
    cu_seqlens = torch.tensor([0, 2, 2, 4, 5], dtype=torch.int32)
    inputs = {"x": torch.randn(5, 70), "weights": torch.randn(5)}
    for how in ("max", "attention"):
        check(
            "seg_pool",
            lambda x, weights=None, how=how: ops.seg_pool(
                x, cu_seqlens, how, weights=weights, normalize=True
            ),
            lambda x, weights=None, how=how: ref.seg_pool(x, cu_seqlens, how, weights, True),
            inputs if how == "attention" else {"x": inputs["x"]},
            (4, 70),
        )


def main():
    torch.manual_seed(0)
    for stem in ops.OPS:
        globals()[f"check_{stem}"]()
    print(json.dumps({"done": DONE, "file": info.__file__, **info.collect()}))


if __name__ == "__main__":
    main()
