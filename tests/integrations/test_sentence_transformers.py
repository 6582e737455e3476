"""`enable`: sentence-transformers on flattened texts."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from encoders import config_of, model_of, transformers

st = pytest.importorskip("sentence_transformers")
from encfast.integrations.sentence_transformers import enable  # noqa: E402

TEXTS = ["w1 w2 w3 w4 w5 w6 w7", "w8", "w9 w10 w11", "w12 w13 w14 w15 w16 w17 w18 w19 w20"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By architecture: weights and a tokenizer of words."""
    tokenizers = pytest.importorskip("tokenizers")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {w: i for i, w in enumerate(special + [f"w{i}" for i in range(40)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        **dict(zip(names, special, strict=True)),
    )

    def folder(system: str) -> str:
        path = tmp_path_factory.mktemp(system)
        fast.save_pretrained(path)
        model_of(system, pad_token_id=0).save_pretrained(path)
        return str(path)

    return folder


def loaded(folder: str):
    return st.SentenceTransformer(
        folder, device="cpu", model_kwargs={"attn_implementation": "eager"}
    )


@pytest.mark.parametrize("system", ["bert", "roberta", "distilbert", "modernbert", "mpnet"])
def test_embeddings_and_gradients(folders, system):
    """As before, from blocks that see no padding."""
    model = loaded(folders(system))
    expected = model.encode(TEXTS, convert_to_tensor=True)
    before = gradients(model)
    assert enable(model) is model
    shapes = []
    block = next(m for n, m in model.named_modules() if n.endswith(("layer.0", "layers.0")))
    block.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    found = model.encode(TEXTS, convert_to_tensor=True)
    assert shapes == [(1, sum(len(t.split()) for t in TEXTS), 32)]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    after = gradients(model)
    assert after.keys() >= before.keys() - {n for n in before if "pooler" in n}
    for name, wanted in before.items():
        torch.testing.assert_close(after[name], wanted, rtol=1e-4, atol=1e-5, msg=name)


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(model.preprocess(TEXTS))["sentence_embedding"]
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_versions_and_models_that_are_not_known():
    with (
        mock.patch.object(sys.modules["sentence_transformers"], "__version__", "5.4.1"),
        pytest.raises(ImportError, match=r"sentence-transformers 5.4.1 is not one .*accelerate"),
    ):
        enable([SimpleNamespace()])
    with pytest.raises(NotImplementedError, match="starts with a SimpleNamespace, expected a Tran"):
        enable([SimpleNamespace()])


def test_an_encoder_that_is_not_served(folders):
    config = config_of("bert")
    deberta = transformers.DebertaV2Config(**config.to_dict() | {"model_type": "deberta-v2"})
    model = loaded(folders("bert"))
    model[0].model = transformers.DebertaV2Model(deberta)
    with pytest.raises(NotImplementedError, match=r"enable: .* cannot run on flattened texts; acc"):
        enable(model)
    assert not model[0].can_flatten_inputs
