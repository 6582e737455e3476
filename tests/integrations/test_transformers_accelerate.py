"""Encoders that `accelerate` makes run on packed rows, against what they were."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from encoders import (
    FIRST_BLOCK,
    config_of,
    inputs_of,
    mask_of,
    model_of,
    states,
    text,
    transformers,
)
from torch import Tensor, nn

from encfast.integrations import transformers as hook

PACKED = (
    "bert", "roberta", "distilbert", "electra", "albert", "mpnet", "modernbert", "clip", "siglip",
)  # fmt: skip
TOWERS = ("clip", "siglip")
UNIFORM = ("vit", "whisper")
ROWS = int(mask_of().sum())
POOLED = int((mask_of()[:, -1] == 0).sum())  # padding that SigLIP pools


def rows_of(system: str) -> int:
    return ROWS + POOLED if system == "siglip" else ROWS


def rows_of_first_block(model: nn.Module, system: str) -> list[tuple[int, ...]]:
    """Filled by each call with the shape of what the first block sees."""
    shapes: list[tuple[int, ...]] = []
    block = model.get_submodule(FIRST_BLOCK[system])
    block.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    return shapes


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("system", [*PACKED, *UNIFORM])
def test_outputs_and_undo(system):
    """Valid tokens as before, in blocks that see no padding; undone, all bits are as before."""
    model, inputs = model_of(system), inputs_of(system)
    names = list(model.state_dict())
    with torch.no_grad():
        plain = states(model(**inputs), inputs)
        before = model(**inputs)
        assert hook.accelerate(hook.accelerate(model)) is model
        assert list(model.state_dict()) == names
        shapes = rows_of_first_block(model, system) if system in PACKED else None
        found = states(model(**inputs), inputs)
        assert shapes is None or set(shapes) == {(1, rows_of(system), 32)}
        for name, expected in plain.items():
            assert expected.abs().max() > 0.1
            close(found[name], expected)
        hook.restore(hook.restore(hook.accelerate(nn.Sequential(model))))
        for name, value in before.items():
            if isinstance(value, Tensor):
                assert torch.equal(model(**inputs)[name], value)


@pytest.mark.parametrize("system", PACKED)
def test_padding_anywhere(system):
    """Behind, in front, and in between, where distances count and the grid stays."""
    for mask in (mask_of(), mask_of(left=True), mask_of() * (torch.arange(17) != 3)):
        model = model_of(system)
        model = model.text_model if system in TOWERS else model
        inputs = text(mask)
        with torch.no_grad():
            expected = states(model(**inputs), inputs)["states"]
            hook.accelerate(model)
            close(states(model(**inputs), inputs)["states"], expected)


@pytest.mark.parametrize("system", PACKED)
def test_texts_do_not_leak(system):
    model = model_of(system)
    model = hook.accelerate(model.text_model if system in TOWERS else model)
    inputs = text()
    changed = inputs | {"input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][1, :11] = 7
    with torch.no_grad():
        a, b = (model(**x).last_hidden_state for x in (inputs, changed))
    assert [torch.equal(x, y) for x, y in zip(a, b, strict=True)] == [True, False, True, True]
    assert not a[mask_of() == 0].any() or system in (*TOWERS, "modernbert")  # a norm behind
    assert a.isfinite().all()


@pytest.mark.parametrize("system", [*PACKED, *UNIFORM])
def test_a_training_step(system):
    """Gradients of all parameters, and what an optimizer makes of them."""
    runs = []
    for accelerated in (False, True):
        model, inputs = model_of(system), inputs_of(system)
        model = hook.accelerate(model) if accelerated else model
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        draw = torch.Generator().manual_seed(5)
        found = states(model(**inputs), inputs).values()
        torch.stack(
            [(x * torch.randn(x.shape, generator=draw)).mean() for x in found]
        ).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        runs.append((grads, dict(model.named_parameters())))
    (expected, after), (found, moved) = runs
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        scale = max(1.0, wanted.abs().max().item())
        close(found[name], wanted, 1e-5 * scale)
        close(moved[name], after[name])


@pytest.mark.parametrize("system", PACKED)
def test_hidden_states_come_back_padded(system):
    model = model_of(system)
    model = model.text_model if system in TOWERS else model
    inputs = text() | {"output_hidden_states": True}
    with torch.no_grad():
        expected = model(**inputs)
        hook.accelerate(model)
        found, as_tuple = model(**inputs), model(**inputs, return_dict=False)
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    mask = mask_of().bool()
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        close(a[mask], b[mask], 1e-5 * max(1.0, b[mask].abs().max().item()))
    assert torch.equal(as_tuple[0], found.last_hidden_state)
    assert all(map(torch.equal, as_tuple[-1], found.hidden_states))


@pytest.mark.parametrize(
    ("system", "head"),
    [
        ("bert", "ForMaskedLM"),
        ("roberta", "ForSequenceClassification"),
        ("mpnet", "ForTokenClassification"),
        ("modernbert", "ForSequenceClassification"),
        ("distilbert", "ForQuestionAnswering"),
    ],
)
def test_heads(system, head):
    """Poolers and heads see a grid; the pooler the first token of every text."""
    model = getattr(transformers, f"AutoModel{head}").from_config(config_of(system)).eval()
    inputs = text()
    with torch.no_grad():
        expected = model(**inputs)[0]
        found = hook.accelerate(model)(**inputs)[0]
    mask = mask_of().bool()
    same = expected.shape[:2] == mask.shape
    close(found[mask] if same else found, expected[mask] if same else expected)


@pytest.mark.parametrize("kind", ["behind", "in front", "gaps", "nothing but padding"])
def test_siglip_pools_the_last_place(kind):
    """Padding or not: its state is what it was, and no text sees it."""
    mask = mask_of(left=kind == "in front")
    if kind == "gaps":
        mask[0, 4], mask[1, 2:5] = 0, 0
    model, inputs = model_of("siglip"), text(mask)
    tower = model.text_model
    with torch.no_grad():
        expected = tower(**inputs).pooler_output
        shapes = rows_of_first_block(hook.accelerate(model), "siglip")
        if kind == "nothing but padding":
            inputs["attention_mask"] = mask * torch.tensor([1, 0, 1, 1])[:, None]
            found = tower(**inputs).pooler_output
            assert found.isfinite().all()
            found, expected = found[[0, 2, 3]], expected[[0, 2, 3]]
        else:
            found = tower(**inputs).pooler_output
    kept = inputs["attention_mask"].clone()
    kept[:, -1] = 1
    assert shapes == [(1, int(kept.sum()), 32)]
    assert expected.abs().max() > 0.1
    close(found, expected)


@pytest.mark.parametrize("system", ["bert", "modernbert", "mpnet"])
def test_4d_masks_keep_the_grid(system):
    model, inputs = model_of(system), text()
    full = mask_of()[:, None, None].bool().expand(4, 1, 17, 17)
    inputs["attention_mask"] = torch.zeros(full.shape).masked_fill(~full, -1e9)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        shapes = rows_of_first_block(hook.accelerate(model), system)
        found = model(**inputs).last_hidden_state
    assert shapes == [(4, 17, 32)]
    close(found[mask_of().bool()], expected[mask_of().bool()])


@pytest.mark.parametrize("system", ["bert", "modernbert", "mpnet"])
def test_nothing_to_drop(system):
    model, inputs = model_of(system), text(mask_of((17,) * 4))
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        shapes = rows_of_first_block(hook.accelerate(model), system)
        close(model(**inputs).last_hidden_state, expected)
        inputs.pop("attention_mask")
        if system != "mpnet":
            close(model(**inputs).last_hidden_state, expected)
    assert set(shapes) == {(4, 17, 32)}


@pytest.mark.parametrize("system", ["bert", "mpnet", "modernbert"])
def test_copies_and_files(system):
    """A copy is accelerated by itself; weights go to and come from other models."""
    model, inputs = hook.accelerate(model_of(system)), text()
    twin = copy.deepcopy(model)
    hook.restore(model)
    shapes = rows_of_first_block(twin, system)
    file = io.BytesIO()
    torch.save(twin.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        expected = twin(**inputs).last_hidden_state
        assert shapes == [(1, ROWS, 32)]
        plain = model_of(system)
        plain.load_state_dict(torch.load(file))
        mask = mask_of().bool()
        close(plain(**inputs).last_hidden_state[mask], expected[mask])


def test_dropout_and_checkpointing():
    """Both work on rows, and repeat with the seed."""
    model = hook.accelerate(model_of("bert", hidden_dropout_prob=0.2)).train()
    runs = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model.zero_grad()
        model(**text()).last_hidden_state.sum().backward()
        runs.append([p.grad.clone() for p in model.encoder.parameters()])
    assert runs[0] and all(map(torch.equal, *runs))


# ---- what is refused ----


def test_models_without_such_an_encoder():
    config = transformers.DebertaV2Config(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
    )
    version = transformers.__version__
    for model, rest in (
        (transformers.DebertaV2Model(config), "it stays as it is"),
        (model_of("t5"), r'attn_implementation="encfast" after register\(\) serves its attention'),
        (nn.Linear(2, 2), "it stays as it is"),
    ):
        name, was = type(model).__name__, getattr(model, "config", None)
        with pytest.raises(
            NotImplementedError, match=rf"{name} with transformers {version} has no.*bert, .*{rest}"
        ):
            hook.accelerate(model)
        assert was is None or was._attn_implementation != "encfast"
        assert not any(m._forward_pre_hooks for m in model.modules())


def test_decoders():
    model = transformers.BertLMHeadModel(config_of("bert", is_decoder=True))
    with pytest.raises(NotImplementedError, match=r"BertLMHeadModel .* \(config.is_decoder\)"):
        hook.accelerate(model)
    assert not model.bert.encoder._forward_pre_hooks


# ---- in other people's trainers ----


def losses(model: nn.Module, steps: int, folder) -> list[float]:
    """Of masked language modelling on ragged texts by transformers' Trainer."""
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, 64, (int(n),), generator=draw) for n in torch.randint(1, 17, (32,))]
    rows = [{"input_ids": x, "labels": x, "attention_mask": torch.ones_like(x)} for x in texts]

    def collate(batch: list[dict]) -> dict[str, Tensor]:
        fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        return {
            k: nn.utils.rnn.pad_sequence([r[k] for r in batch], True, v) for k, v in fill.items()
        }

    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        logging_steps=1,
        learning_rate=1e-3,
        gradient_checkpointing=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def masked_lm(**changes) -> nn.Module:
    torch.manual_seed(0)
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    model = transformers.BertForMaskedLM(config_of("bert", **dropout, **changes))
    model.bert.load_state_dict(model_of("bert").state_dict(), strict=False)
    return model


@pytest.mark.slow
def test_trainer_follows_the_same_curve(tmp_path):
    """With activation checkpointing, its default optimizer, schedule and clipping."""
    pytest.importorskip("accelerate")
    expected = losses(masked_lm(), 30, tmp_path)
    found = losses(hook.accelerate(masked_lm()), 30, tmp_path)
    assert len(expected) == 30 and expected[-1] < expected[0] - 0.1
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("first", ["accelerate", "adapters"])
def test_adapters(first):
    """LoRA in front of and behind `accelerate`: outputs and gradients of the adapters."""
    peft = pytest.importorskip("peft")
    runs = []
    for accelerated in (False, True):
        model = masked_lm().eval()
        if accelerated and first == "accelerate":
            hook.accelerate(model)
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        if accelerated:
            hook.accelerate(model)
        logits = model(**text()).logits[mask_of().bool()]
        logits.square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        runs.append([logits.detach(), *grads])
    assert len(runs[0]) == 5
    for found, expected in zip(runs[1], runs[0], strict=True):
        scale = expected.abs().max().item()
        assert scale > 1e-2
        close(found, expected, 1e-5 * max(1, scale))
