"""Masked images: tokens chosen and put back, pixels gathered, against the published recipes.

`argsort + gather` and `cat + gather` are what masked autoencoders do (arXiv:2111.06377), with an
int64 index as wide as the tokens; `topk + index_select` and `expand + index_copy_` are the better
plain PyTorch. A clone of the result reads and writes all of it once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from harness import BenchSpec, Call, Gate, Setting, Variant, error_gate
from torch import Tensor

from encfast import ops

KEPT = 4  # one in so many
FLOOR = "clone of the result"
SHUFFLED = "encfast shuffled"


@dataclass(frozen=True)
class Inputs:
    """A batch of masked token sequences, and the gradient that comes back."""

    tokens: Tensor  # [B, N, C]
    noise: Tensor  # [B, N]
    mask_token: Tensor  # [C]
    positions: Tensor  # [N, C]
    ids_shuffle: Tensor  # [B, N]
    ids_restore: Tensor  # [B, N], of visible rows in ascending order
    chosen: ops.PatchSelection  # in ascending order
    rows: Tensor  # [B * K, C]: the visible tokens
    grad: Tensor  # [B * K, C]

    @property
    def keep(self) -> int:
        """Tokens kept of each sequence."""
        return self.rows.shape[0] // self.tokens.shape[0]


def _inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> Inputs:
    make = torch.Generator().manual_seed(0)
    tokens = torch.randn(shape, generator=make).to(device, dtype)
    # No ties, which topk and argsort resolve as they like.
    noise = (torch.rand(shape[:2], generator=make).argsort(1) / shape[1]).to(device)
    chosen = ops.select_patches(noise, shape[1] // KEPT)
    rows = tokens.flatten(0, 1)[chosen.visible]
    mask_token = torch.randn(shape[2], generator=make).to(device, dtype)
    positions = torch.randn(shape[1:], generator=make).to(device, dtype)
    order = noise.argsort(dim=1, stable=True)
    grad = torch.randn(rows.shape, generator=make).to(device, dtype)
    restore = _ids_restore(chosen, shape[0], shape[1] // KEPT)
    return Inputs(tokens, noise, mask_token, positions, order, restore, chosen, rows, grad)


def _ids_restore(chosen: ops.PatchSelection, batch: int, keep: int) -> Tensor:
    """[B, N]: where each patch stands among its sequence's visible rows with mask tokens behind."""
    hidden = chosen.restore.view(batch, -1) < 0
    rank = torch.where(hidden, hidden.cumsum(1) - 1, 0)
    first = keep * torch.arange(batch, device=hidden.device)[:, None]
    return torch.where(hidden, keep + rank, chosen.restore.view(batch, -1) - first)


# ---- from noise to visible tokens ----


def _select(i: Inputs, tokens: Tensor, ordered: bool) -> Tensor:
    visible = ops.select_patches(i.noise, i.keep, ordered=ordered).visible
    return ops.gather_rows(tokens.flatten(0, 1), visible)


def _argsort_gather(i: Inputs, tokens: Tensor) -> Tensor:
    ids_shuffle = i.noise.argsort(dim=1)
    ids_shuffle.argsort(dim=1)  # ids_restore, which the decoder needs
    index = ids_shuffle[:, : i.keep, None].repeat(1, 1, tokens.shape[2])
    return tokens.gather(1, index).flatten(0, 1)


def _topk_index_select(i: Inputs, tokens: Tensor) -> Tensor:
    kept = i.noise.topk(i.keep, dim=1, largest=False).indices
    first = torch.arange(len(kept), device=kept.device)[:, None] * tokens.shape[1]
    return tokens.flatten(0, 1).index_select(0, (kept + first).flatten())


_MASKS: dict[str, Callable[[Inputs, Tensor], Tensor]] = {
    "argsort + gather": _argsort_gather,
    "topk + index_select": _topk_index_select,
    "encfast": lambda i, tokens: _select(i, tokens, True),
    SHUFFLED: lambda i, tokens: _select(i, tokens, False),
}


def _forward(mask: Callable[[Inputs, Tensor], Tensor], i: Inputs) -> Call:
    return Call(lambda: mask(i, i.tokens))


def _both(mask: Callable[[Inputs, Tensor], Tensor], i: Inputs) -> Call:
    leaf = i.tokens.detach().requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        out = mask(i, leaf)
        return out, torch.autograd.grad(out, leaf, i.grad)[0]

    return Call(run)


def _expected_visible(i: Inputs, variant: Variant) -> Tensor:
    """Ids in the order of the variant: ascending, or that of the noise."""
    if variant.name in ("encfast", FLOOR):
        return i.chosen.visible
    first = torch.arange(len(i.tokens), device=i.noise.device)[:, None] * i.tokens.shape[1]
    return (i.ids_shuffle[:, : i.keep] + first).flatten()


def _verify_mask(i: Inputs, variant: Variant, rows: Tensor) -> Gate:
    return _equal(rows, i.tokens.flatten(0, 1)[_expected_visible(i, variant)])


def _verify_both(i: Inputs, variant: Variant, results: tuple[Tensor, Tensor]) -> Gate:
    rows, grad = results
    expected = torch.zeros_like(i.tokens).flatten(0, 1)
    expected[_expected_visible(i, variant)] = i.grad
    gate = _verify_mask(i, variant, rows)
    return _equal(grad, expected.view_as(i.tokens)) if gate.ok else gate


def _equal(actual: Tensor, expected: Tensor) -> Gate:
    ok = torch.equal(actual, expected)
    return Gate(ok, "equal bits" if ok else "differs from the rows it should hold")


# ---- back among the sequences ----


def _restore(i: Inputs, positions: Tensor | None) -> Tensor:
    return ops.restore_rows(i.rows, i.chosen.restore, i.mask_token, add=positions)


def _cat_gather(i: Inputs, positions: Tensor | None) -> Tensor:
    batch, patches, channels = i.tokens.shape
    masked = i.mask_token.repeat(batch, patches - i.keep, 1)
    index = i.ids_restore[:, :, None].repeat(1, 1, channels)
    full = torch.cat([i.rows.view(batch, i.keep, channels), masked], 1).gather(1, index)
    return (full if positions is None else full + positions).flatten(0, 1)


def _expand_index_copy(i: Inputs, positions: Tensor | None) -> Tensor:
    full = i.mask_token.repeat(i.noise.numel(), 1).index_copy_(0, i.chosen.visible, i.rows)
    if positions is not None:
        full.view(i.tokens.shape).add_(positions)
    return full


def _expected_restored(i: Inputs, positions: Tensor | None, dtype: torch.dtype) -> Tensor:
    full = i.mask_token.to(dtype).repeat(i.noise.numel(), 1)
    full[i.chosen.visible] = i.rows.to(dtype)
    if positions is None:
        return full
    return (full.view(i.tokens.shape) + positions.to(dtype)).flatten(0, 1)


_RESTORES: dict[str, Callable[[Inputs, Tensor | None], Tensor]] = {
    "cat + gather": _cat_gather,
    "expand + index_copy_": _expand_index_copy,
    "encfast": _restore,
}


def _restored(restore: Callable, i: Inputs) -> Call:
    return Call(lambda: restore(i, None))


def _placed(restore: Callable, i: Inputs) -> Call:
    return Call(lambda: restore(i, i.positions))


def _verify_restore(i: Inputs, variant: Variant, rows: Tensor) -> Gate:
    return _equal(rows, _expected_restored(i, None, rows.dtype))


def _verify_placed(i: Inputs, variant: Variant, rows: Tensor) -> Gate:
    exact = _expected_restored(i, i.positions, torch.float64)
    plain = _expected_restored(i, i.positions, rows.dtype)
    return error_gate(variant.name, rows, exact, plain, 2.0)


# ---- from pixels to visible tokens ----


@dataclass(frozen=True)
class Pixels:
    """A batch of images, a patch embedding, and the patches a model sees."""

    image: Tensor  # [B, 3, H, W]
    weight: Tensor  # [C, 3, p, p]
    visible: Tensor  # [K]


def _pixels(batch: int, size: int, channels: int, dtype: torch.dtype, device: str) -> Pixels:
    make = torch.Generator().manual_seed(0)
    patch = 16
    image = torch.randn(batch, 3, size, size, generator=make).to(device, dtype)
    weight = torch.randn(channels, 3, patch, patch, generator=make).to(device, dtype) / 28
    patches = (size // patch) ** 2
    noise = torch.rand(batch, patches, generator=make).to(device)
    return Pixels(image, weight, ops.select_patches(noise, patches // KEPT).visible)


def _gather_matmul(i: Pixels) -> Tensor:
    return ops.gather_patches(i.image, i.visible, i.weight.shape[2:]) @ i.weight.flatten(1).T


def _conv_gather(i: Pixels) -> Tensor:
    tokens = F.conv2d(i.image, i.weight, stride=i.weight.shape[2:]).flatten(2).mT
    return tokens.flatten(0, 1).index_select(0, i.visible)


def _verify_pixels(i: Pixels, variant: Variant, tokens: Tensor) -> Gate:
    exact = _conv_gather(Pixels(i.image.double(), i.weight.double(), i.visible))
    return error_gate(variant.name, tokens, exact, _conv_gather(i), 2.0)


# ---- specs ----


def _spec(
    name: str,
    title: str,
    inputs: Callable[[], Any],
    makers: dict[str, Callable[[Any], Call]],
    verify: Callable[[Any, Variant, Any], Gate],
    moved: Callable[[Any], float],
    dtype: torch.dtype,
    setting: Setting,
) -> BenchSpec:
    short = "bf16" if dtype == torch.bfloat16 else "fp32"
    return BenchSpec(
        name=f"patch_gather/{name}-{short}",
        title=f"{title}, {short}",
        inputs=inputs,
        variants=tuple(
            Variant(n, dtype, make, ours=n.startswith("encfast")) for n, make in makers.items()
        ),
        verify=verify,
        bytes=moved,
        pairs=tuple(
            ("encfast", peer) for peer in makers if peer not in ("encfast", FLOOR, SHUFFLED)
        ),
        budget_s={"tiny": 0.1, "quick": 1.0, "full": 5.0}[setting.suite],
    )


def _token_specs(
    shape: tuple[int, int, int], case: str, dtype: torch.dtype, setting: Setting
) -> list[BenchSpec]:
    def spec(name: str, title: str, makers: dict, verify: Callable, moved: Callable) -> BenchSpec:
        return _spec(
            name.format(case),
            f"{title.format(case)}, B={shape[0]}, C={shape[2]}",
            lambda: _inputs(shape, dtype, setting.device),
            makers,
            verify,
            moved,
            dtype,
            setting,
        )

    def makers(bind: Callable, functions: dict[str, Callable]) -> dict[str, Callable]:
        return {name: functools.partial(bind, f) for name, f in functions.items()}

    visible = {FLOOR: lambda i: Call(i.rows.clone)}
    whole = {FLOOR: lambda i: Call(_expected_restored(i, None, dtype).clone)}
    return [
        spec(
            "mask-{}-fwd",
            "noise to visible tokens, {}",
            makers(_forward, _MASKS) | visible,
            _verify_mask,
            lambda i: 2.0 * i.rows.nbytes,
        ),
        spec(
            "mask-{}-fwd+bwd",
            "noise to visible tokens and back, {}",
            makers(_both, _MASKS),
            _verify_both,
            lambda i: 3.0 * i.rows.nbytes + i.tokens.nbytes,
        ),
        spec(
            "restore-{}-fwd",
            "mask tokens in the gaps, {}",
            makers(_restored, _RESTORES) | whole,
            _verify_restore,
            lambda i: float(i.rows.nbytes + i.tokens.nbytes),
        ),
        spec(
            "restore-{}-positions-fwd",
            "mask tokens in the gaps, positions added, {}",
            makers(_placed, _RESTORES),
            _verify_placed,
            lambda i: float(i.rows.nbytes + i.tokens.nbytes),
        ),
    ]


def _pixel_spec(
    batch: int, size: int, channels: int, dtype: torch.dtype, setting: Setting
) -> BenchSpec:
    return _spec(
        f"pixels-{size}",
        f"visible patches of {batch} x 3 x {size} x {size} embedded",
        lambda: _pixels(batch, size, channels, dtype, setting.device),
        {
            "conv2d + index_select": lambda i: Call(lambda: _conv_gather(i)),
            "encfast": lambda i: Call(lambda: _gather_matmul(i)),
        },
        _verify_pixels,
        lambda i: float(i.image.nbytes / KEPT + i.weight.nbytes),
        dtype,
        setting,
    )


def specs(setting: Setting) -> list[BenchSpec]:
    """The benches of this op in a suite."""
    if setting.suite == "tiny":
        return [
            *_token_specs((2, 8, 4), "N8", torch.float32, setting),
            _pixel_spec(1, 32, 8, torch.float32, setting),
        ]
    quick = setting.suite == "quick"
    dtypes = (torch.float32,) if quick else (torch.float32, torch.bfloat16)
    # Calls on 1568 patches take up to seconds.
    tokens = [
        spec
        for patches in ((196,) if quick else (196, 1568))
        for dtype in dtypes
        for spec in _token_specs((64, patches, 768), f"N{patches}", dtype, setting)
    ]
    if quick:
        tokens = [
            t
            for t in tokens
            if t.name.endswith(("mask-N196-fwd+bwd-fp32", "restore-N196-fwd-fp32"))
        ]
    return [*tokens, *(_pixel_spec(16, 224, 768, dtype, setting) for dtype in dtypes)]
