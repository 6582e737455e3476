"""timm's vision transformers with encfast's attention and patch dropout, against timm's own."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from encfast.integrations import timm as hook
from vision import importorskip

timm = importorskip("timm")

B, N, C, H = 3, 11, 48, 4
TOLERANCE = 1e-5
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": C, "depth": 2, "num_heads": H}
FORMS = {
    "plain": {},
    "bias": {"qkv_bias": True},
    "norms": {
        "qkv_bias": True,
        "qk_norm": True,
        "scale_norm": True,
        "norm_layer": nn.LayerNorm,
    },
    "wide heads": {"attn_head_dim": 20, "dim_out": 32, "proj_bias": False},
    "gated": {"gated": True},
}


def pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    """timm's module and ours with the same random weights."""
    unknown = options.keys() - inspect.signature(timm.layers.Attention).parameters.keys()
    if unknown:
        pytest.skip(f"timm {timm.__version__} has no {', '.join(unknown)}")
    theirs = timm.layers.Attention(C, H, **options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(0.3 * torch.randn(p.shape))
    ours = hook.Attention(C, H, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def results(module: nn.Module, x: Tensor, **given: Any) -> dict[str, Tensor]:
    """The output, and the gradients of the input, all parameters and a floating mask."""
    x = x.detach().clone().requires_grad_()
    leaves = {"x": x, **dict(module.named_parameters())}
    mask = given.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        leaves["mask"] = given["attn_mask"] = mask.detach().clone().requires_grad_()
    out = module(x, **given)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((out * weights).sum(), list(leaves.values()))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        scale = max(1.0, wanted.abs().max().item())
        # The same to all keys of a head changes no weight.
        assert wanted.abs().max() > 1e-3 or name.endswith("k_norm.bias"), name
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=TOLERANCE * scale, msg=name)


def keys_of(lengths: tuple[int, ...] = (N, 4, 7)) -> Tensor:
    return torch.arange(N) < torch.tensor(lengths)[:, None]


# ---- the class ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fused", [True, False])
def test_attention_equals_timms(form, fused):
    """Outputs and every gradient, of both ways in which timm computes it."""
    theirs, ours = pair(**FORMS[form])
    theirs.fused_attn = fused
    x = torch.randn(B, N, C)
    for given in ({}, {"is_causal": True}):
        assert_same(results(ours, x, **given), results(theirs, x, **given))
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize(
    "mask",
    [
        keys_of()[:, None, None],
        keys_of((5,))[:, None, None],
        torch.rand(N, N) < 0.6,
        torch.rand(B, H, N, N) < 0.6,
        torch.randn(N, N),
        torch.randn(H, N, N),
        torch.randn(B, 1, N, N),
        torch.randn(1, H, 1, N),
    ],
    ids=lambda m: f"{m.dtype}-{tuple(m.shape)}",
)
def test_masks(mask):
    """All shapes that timm's attention takes, with the gradient of one that is added."""
    mask = mask.clone()
    if mask.dtype == torch.bool:
        mask[..., 0] = True  # timm has NaN for a query that sees nothing
    theirs, ours = pair(qkv_bias=True)
    x = torch.randn(B, N, C)
    assert_same(results(ours, x, attn_mask=mask), results(theirs, x, attn_mask=mask))


def test_hidden_keys_may_hold_anything():
    _, ours = pair(qkv_bias=True)
    x, mask = torch.randn(B, N, C), keys_of()
    poisoned = x.masked_fill(~mask[..., None], torch.nan)
    expected, found = (ours(y, attn_mask=mask[:, None, None])[mask] for y in (x, poisoned))
    assert torch.equal(found, expected)


def test_a_query_that_sees_no_key_gets_zeros():
    _, ours = pair()
    nn.init.zeros_(ours.proj.bias)
    found = results(ours, torch.randn(B, N, C), attn_mask=keys_of((N, 0, 7))[:, None, None])
    assert not found["out"][1].any() and found["out"][0].all()
    assert all(g.isfinite().all() for g in found.values())


def test_dropout():
    """Of the weights, repeated by the seed, unbiased, and none in eval mode."""
    theirs, ours = pair(attn_drop=0.5)
    x = torch.randn(1, N, C)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(ours(x))
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2], atol=1e-2)
    mean = torch.stack([ours(x).detach() for _ in range(2000)]).mean(0)
    error = (mean - theirs.eval()(x)).abs().max()
    assert error < 0.15 * mean.abs().max()
    assert_same(results(ours.eval(), x), results(theirs, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """No farther from float32 than twice what timm's is."""
    theirs, ours = pair(**FORMS["norms"])
    x = torch.randn(B, N, C)
    exact = theirs(x).detach()
    found, plain = ((m.to(dtype)(x.to(dtype)).float() - exact).abs().max() for m in (ours, theirs))
    assert found <= 2 * plain + torch.finfo(dtype).eps * exact.abs().max()


def test_autocast():
    _, ours = pair(**FORMS["norms"])
    x = torch.randn(B, N, C)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), ours(x), rtol=0.1, atol=0.1)


def test_compiles_without_a_break():
    _, ours = pair(qkv_bias=True)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="eager")
    for batch, size in ((3, 11), (2, 7), (5, 13)):
        x = torch.randn(batch, size, C)
        mask = torch.arange(size) < torch.arange(1, batch + 1)[:, None]
        for given in ({}, {"attn_mask": mask[:, None, None]}, {"is_causal": True}):
            assert torch.equal(compiled(x, **given), ours(x, **given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attn_mask": torch.ones(N, N).bool(), "is_causal": True}, r"\(11, 11\) came together"),
        ({"attn_mask": torch.ones(2, N).bool()}, r"shape \(2, 11\), expected .* \(3, 4, 11, 11\)"),
        ({"attn_mask": torch.ones(1, 1, 1, N, N).bool()}, r"shape \(1, 1, 1, 11, 11\), expected"),
        ({"attn_mask": torch.ones(N, N).int()}, "attn_mask is torch.int32, expected torch.bool"),
    ],
)
def test_masks_that_cannot_be_honoured(given, message):
    _, ours = pair()
    with pytest.raises(ValueError, match=message):
        ours(torch.randn(B, N, C), **given)


# ---- models ----


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", num_classes=5, **SMALL, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def test_a_model_made_with_the_class():
    """Weights of timm's model load as they are."""
    theirs, ours = vit(), vit(attn_layer=hook.Attention)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(isinstance(block.attn, hook.Attention) for block in ours.blocks)
    ours.load_state_dict(theirs.state_dict())
    assert_same(results(ours, images()), results(theirs, images()))


@pytest.mark.parametrize("options", [{}, {"patch_drop_rate": 0.5}, {"qk_norm": True}])
def test_an_accelerated_model_and_back(options):
    model = vit(**options)
    names, draw = list(model.state_dict()), torch.Generator().get_state()
    torch.manual_seed(3)
    expected = results(model, images())
    assert hook.accelerate(hook.accelerate(model)) is model
    assert list(model.state_dict()) == names
    torch.manual_seed(3)
    assert_same(results(model, images()), expected)
    twin = copy.deepcopy(model)
    hook.restore(hook.restore(nn.Sequential(model)))
    assert {type(m).__module__.split(".")[0] for m in model.modules()} <= {"timm", "torch"}
    torch.manual_seed(3)
    assert all(torch.equal(a, expected[n]) for n, a in results(model, images()).items())
    torch.manual_seed(3)
    assert_same(results(twin, images()), expected)
    assert torch.equal(draw, torch.Generator().get_state())


def test_thirty_steps_of_training():
    runs = []
    for accelerated in (False, True):
        model = vit(patch_drop_rate=0.25)
        model = hook.accelerate(model) if accelerated else model
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        torch.manual_seed(4)
        losses = []
        for _ in range(30):
            loss = nn.functional.cross_entropy(model(images(4)), torch.arange(4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append(torch.tensor(losses))
    assert runs[0][-1] < 0.5 * runs[0][0]
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-4, atol=0)


def test_models_without_such_modules():
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1, 1, 1))
    before = [type(m) for m in model.modules()]
    version = timm.__version__
    with pytest.raises(
        NotImplementedError,
        match=rf"SwinTransformer with timm {version} has none of .*WindowAttention; it stays",
    ):
        hook.accelerate(model)
    assert [type(m) for m in model.modules()] == before
    with pytest.raises(NotImplementedError, match=r"Linear with timm .* serves; it stays as it is"):
        hook.accelerate(nn.Linear(2, 2))


def test_an_attention_with_unknown_parts():
    model = vit()
    model.blocks[1].attn.sink = nn.Linear(2, 2)
    with pytest.raises(NotImplementedError, match=r"Attention with sink, which encfast does not k"):
        hook.accelerate(model)
    assert not any(isinstance(m, hook.Attention) for m in model.modules())


# ---- patch dropout ----


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(
    ("prob", "prefix", "patches", "kept"), [(0.5, 1, 10, 5), (0.3, 0, 10, 7), (0.99, 3, 5, 1)]
)
def test_the_same_patches_as_timm(ordered, prob, prefix, patches, kept):
    theirs = timm.layers.PatchDropoutWithIndices(prob, prefix, ordered)
    ours = hook.PatchDropout(prob, prefix, ordered, return_indices=True)
    x = torch.randn(4, prefix + patches, 6)
    runs = []
    for module in (theirs, ours):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)
        out, indices = module(leaf)
        (out * torch.arange(out.numel()).view(out.shape)).sum().backward()
        runs.append((out, indices, leaf.grad))
    assert runs[0][0].shape == (4, prefix + kept, 6)
    assert all(map(torch.equal, runs[0], runs[1]))
    torch.manual_seed(5)
    assert torch.equal(hook.PatchDropout(prob, prefix, ordered)(x), runs[0][0])
    torch.manual_seed(5)
    found = hook.PatchDropoutWithIndices(prob, prefix, ordered)(x)
    assert all(map(torch.equal, found, runs[0][:2]))


def test_nothing_is_dropped():
    x = torch.randn(2, 5, 3)
    for module in (hook.PatchDropout(0.5).eval(), hook.PatchDropout(0.0)):
        assert module(x) is x
        module.return_indices = True
        assert module(x)[0] is x and module(x)[1] is None


def test_patch_dropout_compiles():
    module = hook.PatchDropout(0.5, 1, ordered=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    for batch, size in ((2, 9), (3, 13)):
        x = torch.randn(batch, size, 4)
        torch.manual_seed(6)
        expected = module(x)
        torch.manual_seed(6)
        assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("prob", [-0.1, 1.0, 2])
def test_a_part_to_drop_out_of_range(prob):
    with pytest.raises(ValueError, match=rf"prob is {prob}, expected a number in \[0, 1\)"):
        hook.PatchDropout(prob)


# ---- versions ----


@pytest.mark.parametrize("version", ["0.9.16", "1.0.25", "2.0.0"])
def test_other_versions(version):
    with (
        mock.patch.object(timm, "__version__", version),
        pytest.raises(
            ImportError, match=rf"timm {version} is not one .*checked with 1\.0\.26 to 1\.0\.31"
        ),
    ):
        hook.accelerate(vit())


def test_a_self_test_that_fails():
    from encfast.integrations import _timm_modules

    hook._self_test.cache_clear()
    with (
        mock.patch.object(_timm_modules, "attend", lambda q, *_, **__: q),
        pytest.raises(RuntimeError, match=rf"timm {timm.__version__} computes attention in a way"),
    ):
        hook.Attention  # noqa: B018
    assert hook.Attention


@pytest.mark.parametrize(
    "error", [ImportError("no timm here"), RuntimeError("operator torchvision::nms does not exist")]
)
def test_timm_that_does_not_load(error):
    """Missing; or beside a torchvision that is not of this PyTorch."""
    message = f"needs timm, which could not be imported: {error}; it was checked with timm 1.0.26"
    with (
        mock.patch("importlib.import_module", side_effect=error),
        pytest.raises(ImportError, match=re.escape(message)),
    ):
        hook.accelerate(nn.Linear(2, 2))


def test_other_names():
    with pytest.raises(AttributeError, match="has no attribute 'Mlp'"):
        hook.Mlp  # noqa: B018
