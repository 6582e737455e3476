"""Every registered tiny model: what trainers, checkpoints and compilers expect of it.

A model file gets these tests by registering. They assume `loss(batch).total`, and either
`example_batch(generator, lengths=...)` with `.tokens` or `.clips` (a PackedBatch of ids, or of
numbers) and a model of these, or, of images, `example_batch(generator, batch_size=...)` with
`.images`, where there is one `.mask`, and `model(images, mask)`.
"""

import copy
import dataclasses
import inspect

import pytest
import torch
from torch.utils import _pytree as pytree

import encfast
from encfast import PackedBatch
from encfast.registry import get_config

from .models.common import SIX_SHAPES, assert_compiles

TINY = encfast.list_models("*/tiny*")
tiny = pytest.mark.parametrize("name", TINY)
RAGGED = [9, 0, 1, 14, 30]


def create(name: str, **kwargs):
    """Without dropout and noise, so that two passes compare."""
    fields = dataclasses.fields(get_config(name))
    quiet = {f.name: 0.0 for f in fields if f.name == "noise" or f.name.endswith("dropout")}
    return encfast.create(name, **quiet | kwargs)


def sees_images(model) -> bool:
    return "batch_size" in inspect.signature(model.example_batch).parameters


def example(model, lengths=RAGGED, seed: int = 0):
    """A batch of sequences of these lengths, or of as many images."""
    generator = torch.Generator().manual_seed(seed)
    if sees_images(model):
        return model.example_batch(generator, batch_size=len(lengths))
    return model.example_batch(generator, lengths=lengths)


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def packed_field(batch) -> str:
    """The name of what is packed: tokens, or frames of clips."""
    return "clips" if hasattr(batch, "clips") else "tokens"


def reads_ids(name: str) -> bool:
    model = create(name)
    if sees_images(model):
        return False
    batch = example(model)
    return not getattr(batch, packed_field(batch)).data.is_floating_point()


def outputs(model, batch) -> list[torch.Tensor]:
    """The floating tensors that forward returns."""
    if sees_images(model):
        out = model(batch.images, *([batch.mask] if hasattr(batch, "mask") else []))
    else:
        out = model(getattr(batch, packed_field(batch)))
    found = [t for t in tensors(out) if t.is_floating_point()]
    assert found, "forward returned no floating tensor"
    return found


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model.loss(batch).total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.quick
@tiny
def test_a_training_step_reaches_every_parameter(name):
    model = encfast.create(name)
    batch = model.example_batch(torch.Generator().manual_seed(0))
    losses = model.loss(batch)
    assert losses.total.dim() == 0 and losses.total.isfinite()
    losses.total.backward()
    for parameter, grad in ((n, p.grad) for n, p in model.named_parameters() if p.requires_grad):
        assert grad is not None, f"{parameter} takes no gradient"
        assert grad.isfinite().all(), f"{parameter} has a gradient that is not finite"


@pytest.mark.quick
@tiny
def test_example_batches_repeat_with_their_generator(name):
    model = create(name)
    first, second = example(model), example(model)
    if sees_images(model):
        assert len(first.images) == len(RAGGED)
    else:
        lengths = getattr(first, packed_field(first)).lengths().tolist()
        step = lengths[RAGGED.index(1)]  # a clip has several frames per time index
        assert lengths == [step * n for n in RAGGED]
    for a, b in zip(tensors(first), tensors(second), strict=True):
        assert torch.equal(a, b)


@pytest.mark.quick
@tiny
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [0, 2, 0]], ids=str)
def test_tolerates_empty_sequences_and_batches(name, lengths):
    model = create(name)
    batch = example(model, lengths)
    assert all(output.isfinite().all() for output in outputs(model, batch))
    for parameter, grad in gradients(model, batch).items():
        assert grad is None or grad.isfinite().all(), f"gradient of {parameter}"
    assert model.loss(batch).total.isfinite()


@pytest.mark.quick
@tiny
def test_a_padded_grid_gives_what_its_rows_give(name):
    """The pad positions hold an id that is in no vocabulary: reading one is an error."""
    model = create(name).eval()
    if sees_images(model):
        pytest.skip("images of one size have no padding")
    batch = example(model)
    field = packed_field(batch)
    tokens = getattr(batch, field)
    grid = tokens.to_padded(fill=2**30)
    mask = torch.arange(grid.shape[1]) < tokens.lengths()[:, None]
    repacked = PackedBatch.pack(grid, mask)
    with torch.no_grad():
        padded = dataclasses.replace(batch, **{field: repacked})
        for a, b in zip(outputs(model, padded), outputs(model, batch), strict=True):
            assert torch.equal(a, b)


@pytest.mark.quick
@tiny
def test_checkpointing_changes_nothing(name):
    model = create(name).train()
    batch = example(model)
    kept = gradients(model, batch)
    model.gradient_checkpointing_enable()
    recomputed = gradients(model, batch)
    model.gradient_checkpointing_disable()
    for parameter, grad in gradients(model, batch).items():
        assert torch.equal(grad, kept[parameter]), f"gradient of {parameter}, switched off again"
        assert torch.equal(recomputed[parameter], kept[parameter]), f"gradient of {parameter}"


@pytest.mark.quick
@tiny
def test_deferred_initialisation(name):
    built, deferred = create(name), create(name, device="meta")
    assert all(p.is_meta for p in deferred.parameters())
    deferred.to_empty(device="cpu")
    deferred.reset_parameters()
    assert deferred.num_parameters() == built.num_parameters(), "a tie was lost"
    for (path, a), (_, b) in zip(
        deferred.named_parameters(), built.named_parameters(), strict=True
    ):
        if b.numel() > 1 and b.std() == 0:
            assert torch.equal(a, b), f"{path} is a constant"
        else:
            # Different draws of one distribution.
            assert a.isfinite().all()
            if b.numel() > 1000:
                torch.testing.assert_close(a.std(), b.std(), rtol=0.1, atol=0)
    for (path, a), (_, b) in zip(deferred.named_buffers(), built.named_buffers(), strict=True):
        assert torch.equal(a, b), f"buffer {path}"
    assert deferred.loss(example(deferred)).total.isfinite()


@pytest.mark.quick
@tiny
def test_state_dict_and_deepcopy_keep_the_model(name):
    model = create(name)
    batch = example(model)
    expected = model.loss(batch).total
    other = create(name)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.loss(batch).total, expected)
    twin = copy.deepcopy(model)
    assert twin.num_parameters() == model.num_parameters()
    assert torch.equal(twin.loss(batch).total, expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model.loss(batch).total, expected), "the copy shares memory"


@pytest.mark.quick
@tiny
def test_half_precision(name):
    model = create(name, dtype=torch.bfloat16)
    batch = example(model)
    assert all(output.isfinite().all() for output in outputs(model, batch))
    assert model.loss(batch).total.isfinite()


@pytest.mark.quick
@pytest.mark.parametrize("name", encfast.list_models("*"))
def test_describes_itself(name):
    description = encfast.describe(name)
    info = description.info
    assert description.parameters > 0
    assert all((info.title, info.paper, info.tasks, info.inputs, info.fidelity))
    assert all(op in encfast.ops.OPS for op in info.ops)


@pytest.mark.quick
@tiny
def test_offers_what_trainers_look_for(name):
    model = create(name, device="meta")
    if reads_ids(name):
        assert isinstance(model.get_input_embeddings(), torch.nn.Embedding)
    classes = {type(m).__name__ for m in model.modules()}
    assert set(model._no_split_modules) <= classes


@tiny
@pytest.mark.parametrize(
    "checkpointing",
    # Under checkpointing, the test with dropout compiles as well.
    [
        pytest.param(False, id="plain"),
        pytest.param(True, id="checkpointing", marks=pytest.mark.slow),
    ],
)
def test_compiles_whole_in_two_graphs(name, checkpointing):
    model = create(name).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    batches = [example(model, lengths, seed) for seed, lengths in enumerate(SIX_SHAPES)]
    assert_compiles(model, batches)


@tiny
@pytest.mark.parametrize(
    "checkpointing",
    # The second shows what the first does; the first tells whose fault a failure is.
    [
        pytest.param(False, id="plain", marks=pytest.mark.slow),
        pytest.param(True, id="checkpointing"),
    ],
)
def test_compiles_whole_with_dropout(name, checkpointing):
    """As published, dropout included: the compiled step draws what the eager one does."""
    model = encfast.create(name).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    batches = [example(model, lengths, seed) for seed, lengths in enumerate(SIX_SHAPES[:3])]
    assert_compiles(model, batches)
