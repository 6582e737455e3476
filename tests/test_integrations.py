"""encfast inside of other libraries, on their own classes with random weights."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from encfast.integrations import _transformers_experts as experts_hook
from encfast.integrations import transformers as hook
from encfast.testing import assert_close_to_reference

transformers = pytest.importorskip("transformers")
moe = pytest.importorskip("transformers.integrations.moe")

C, F, E, K = 24, 40, 5, 2  # in bf16 PyTorch takes rows of a multiple of 16 bytes alone
CONFIG = {
    "hidden_size": C,
    "intermediate_size": F,
    "num_local_experts": E,
    "num_experts_per_tok": K,
    "hidden_act": "silu",
    "router_jitter_noise": 0.0,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 0.7,  # low enough to cut
    # of those with names of their own
    "n_routed_experts": E,
    "moe_num_experts": E,
    "moe_intermediate_size": F,
    "moe_hidden_size": C,
    "moe_latent_size": None,
    "mlp_hidden_act": "relu2",
    "post_norm_eps": 1e-6,
}
CLASSES = {
    "mixtral": "MixtralExperts",
    "openai_privacy_filter": "OpenAIPrivacyFilterExperts",  # transposed, biases, its own gate
    "gpt_oss": "GptOssExperts",  # the same, gate and up interleaved
    "aria": "AriaExperts",  # transposed
    "nemotron_h": "NemotronHExperts",  # no gate
    "muse_spark": "MuseSparkExperts",  # a norm behind
}


@pytest.fixture(autouse=True, scope="module")
def _registered():
    hook.register()
    yield
    del moe.ExpertsInterface._global_mapping[hook.NAME]


def modeling(system: str):
    return pytest.importorskip(f"transformers.models.{system}.modeling_{system}")


def filled(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=draw))
    return module.to(dtype)


def experts_of(system: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    kind = getattr(modeling(system), CLASSES[system])
    return filled(kind(SimpleNamespace(**CONFIG)), dtype)


def inputs(tokens: int = 29, *, none: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, ids without the expert 1, with `none` some of E and more, and weights."""
    draw = torch.Generator().manual_seed(1)
    x, weights = torch.randn(tokens, C, generator=draw), torch.rand(tokens, K, generator=draw)
    ids = torch.rand(tokens, E, generator=draw).argsort(1)[:, :K]
    ids[ids == 1] = 4
    if none:
        ids[::3, 0], ids[4:7] = E, E
        weights[ids == E] = 0  # as transformers' expert parallelism has it
    return x, ids, weights


def run(experts: nn.Module, name: str, x: Tensor, ids: Tensor, weights: Tensor) -> dict:
    """Result and every gradient by the implementation of this name."""
    experts.config = SimpleNamespace(**CONFIG, _experts_implementation=name)
    x, weights = (t.detach().clone().requires_grad_() for t in (x, weights))
    out = experts(x, ids, weights)
    given = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaves = {"x": x, "weights": weights, **dict(experts.named_parameters())}
    grads = torch.autograd.grad(out, list(leaves.values()), given.to(out.dtype))
    return {"out": out.detach(), **{f"d {n}": g for n, g in zip(leaves, grads, strict=True)}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("system", CLASSES)
def test_experts_are_as_accurate_as_transformers_grouped_mm(system, dtype):
    experts = experts_of(system, dtype)
    x, ids, weights = inputs()
    x, weights = x.to(dtype), weights.to(dtype)
    found = run(experts, "encfast", x, ids, weights)
    plain = run(experts, "grouped_mm", x, ids, weights)
    exact = _in_double(experts_of(system, dtype), x, ids, weights)
    for name, got in found.items():
        factor = 2.0 if name == "out" else 3.0
        assert_close_to_reference(name, got, exact[name], plain[name], factor)


def _in_double(experts: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> dict:
    """The eager loop in float64, also of classes whose own loop goes through float32."""
    with mock.patch.object(Tensor, "float", Tensor.double), _wide_zeros():
        return run(experts.double(), "eager", x.double(), ids, weights.double())


def _wide_zeros():
    plain = torch.zeros_like

    def zeros_like(x, *, dtype=None, device=None):
        return plain(x, dtype=torch.float64, device=device)

    return mock.patch.object(torch, "zeros_like", zeros_like)


@pytest.mark.parametrize("system", ["mixtral", "aria", "muse_spark"])
def test_choices_of_no_expert_are_left_out(system):
    experts = experts_of(system)
    x, ids, weights = inputs(none=True)
    assert (ids == E).all(1).any()  # a token without any
    expected = run(experts, "eager", x, ids, weights)
    far = torch.where(ids == E, 1000, ids)
    for chosen in (ids, far):
        found = run(experts, "encfast", x, chosen, weights)
        for name, wanted in expected.items():
            torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5)
        assert not found["out"][4:7].any() and not found["d weights"][ids == E].any()
        assert found["d x"].isfinite().all() and not found["d x"][4:7].any()


def test_weights_of_no_expert_may_hold_anything():
    experts = experts_of("openai_privacy_filter")
    x, ids, weights = inputs(none=True)
    expected = run(experts, "encfast", x, ids, weights)
    found = run(experts, "encfast", x, ids, weights.masked_fill(ids == E, torch.nan))
    assert all(torch.equal(found[name], wanted) for name, wanted in expected.items())


def test_no_tokens():
    found = run(experts_of("mixtral"), "encfast", *inputs(0))
    assert found["out"].shape == (0, C) and not found["d gate_up_proj"].any()


@pytest.mark.parametrize(
    ("system", "block"),
    [("mixtral", "MixtralSparseMoeBlock"), ("openai_privacy_filter", "OpenAIPrivacyFilterMLP")],
)
def test_blocks_with_their_routers(system, block):
    """The whole block, the router's gradient included."""
    found = []
    for name in ("encfast", "eager"):
        layer = filled(
            getattr(modeling(system), block)(
                SimpleNamespace(**CONFIG, _experts_implementation=name)
            )
        )
        x = inputs()[0].view(1, 29, C).requires_grad_()
        out = layer(x)
        out = out[0] if isinstance(out, tuple) else out
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    for a, b in zip(*found, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_a_model_by_its_config(tmp_path):
    """`experts_implementation` reaches the experts, through from_pretrained too."""
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=C,
        intermediate_size=F,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=E,
    )
    tokens = torch.arange(12).view(2, 6)
    plain = transformers.MixtralModel._from_config(config, experts_implementation="eager").eval()
    plain.save_pretrained(tmp_path)
    model = transformers.MixtralModel.from_pretrained(tmp_path, experts_implementation="encfast")
    calls = []
    forward = experts_hook.ops.grouped_mm
    with mock.patch.object(
        experts_hook.ops, "grouped_mm", lambda *a, **k: calls.append(1) or forward(*a, **k)
    ):
        found = model(tokens).last_hidden_state
    assert len(calls) == 4
    torch.testing.assert_close(found, plain(tokens).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_compiles_without_a_break():
    experts = experts_of("mixtral")
    experts.config = SimpleNamespace(**CONFIG, _experts_implementation="encfast")
    compiled = torch.compile(experts, fullgraph=True, dynamic=True, backend="eager")
    for tokens in (5, 9, 17):
        x, ids, weights = inputs(tokens)
        assert torch.equal(compiled(x, ids, weights), experts(x, ids, weights))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: delattr(m, "has_gate"),
            "MixtralExperts has no has_gate, expected experts under",
        ),
        (
            lambda m: m.to(torch.float64),
            r"MixtralExperts\.gate_up_proj has dtype torch\.float64, expected float32, bfloat16",
        ),
        (
            lambda m: setattr(m, "down_proj", nn.Parameter(torch.zeros(3, 2))),
            r"MixtralExperts\.down_proj is \(3, 2\), expected a tensor \[E, out, in\]",
        ),
        (
            lambda m: setattr(m, "gate_up_proj", None),
            r"MixtralExperts\.gate_up_proj is NoneType",
        ),
    ],
)
def test_experts_of_another_form(change, message):
    experts = experts_of("mixtral")
    change(experts)
    with pytest.raises(TypeError, match=message):
        hook.experts_forward(experts, *inputs())


def test_negative_ids():
    x, ids, weights = inputs()
    ids[0, 0] = -3
    with pytest.raises(ValueError, match="expert_ids"):
        hook.experts_forward(experts_of("mixtral"), x, ids, weights)


def test_transformers_that_encfast_does_not_know():
    with (
        mock.patch.dict(sys.modules, {"transformers": None}),
        pytest.raises(ImportError, match=r"needs transformers, .* could not be imported.* it was"),
    ):
        hook.register()
    version = transformers.__version__
    with (
        mock.patch.object(moe, "ExpertsInterface", new=None),
        mock.patch.object(moe, "use_experts_implementation", new=None),
    ):
        del moe.use_experts_implementation
        with pytest.raises(ImportError, match=f"transformers {version} has no ExpertsInterface"):
            hook.register()


def test_a_self_test_that_fails_registers_nothing():
    def doubled(experts, x, ids, weights):
        return hook.experts_forward(experts, x, ids, 2 * weights)

    with (
        mock.patch.object(moe.ExpertsInterface, "register") as register,
        mock.patch.object(experts_hook, "experts_forward", doubled),
        pytest.raises(RuntimeError, match=f"{transformers.__version__} passes experts in a way"),
    ):
        hook.register()
    register.assert_not_called()
