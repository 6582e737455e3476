"""VL-JEPA: what the predictor sees, what trains, one interface."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import encfast
from encfast import PackedBatch
from encfast.models.vl_jepa import VlJepa, VlJepaBatch, param_groups, still_clips

from .common import assert_parity

TINY = encfast.registry.get_config("vl_jepa/tiny")


def tiny(**overrides) -> VlJepa:
    """A model in which no norm or bias is at its start."""
    model = encfast.create("vl_jepa/tiny", **overrides)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() and name != "tokens.weight":
                p.add_(0.1 * torch.randn_like(p))
    return model


def batch_of(model: VlJepa, lengths=(3, 1, 2, 4), seed: int = 0) -> VlJepaBatch:
    return model.example_batch(torch.Generator().manual_seed(seed), lengths=lengths)


# What the predictor sees.


@pytest.mark.quick
@pytest.mark.parametrize("causal", [False, True])
def test_visual_rows_see_the_query_behind_them(causal):
    """Acceptance 1: another last token changes what visual rows become, unless causal."""
    model = tiny(causal=causal).eval()
    batch = batch_of(model)
    seen = model.see(batch.clips)
    found = []
    for shift in (0, 1):
        ids = batch.query.data.clone()
        last = batch.query.last_rows()[0]
        ids[last] = (ids[last] + shift) % model.config.predictor.vocab_size
        query = batch.query.with_data(model.tokens(ids))
        rows = model.predictor.rows(seen, query)
        found.append(rows.split())
    visual = int(seen.lengths()[0])
    moved = (found[0][0][:visual] - found[1][0][:visual]).abs().max()
    assert moved == 0 if causal else moved > 1e-4
    for before, after in zip(found[0][1:], found[1][1:], strict=True):
        assert torch.equal(before, after), "another clip of the batch has changed"


@pytest.mark.quick
def test_padding_does_not_exist():
    """Acceptance 2: queries padded to 16, 64 or 512 with any id give the same embedding."""
    model = tiny().eval()
    batch = batch_of(model)
    longest = batch.query.max_seqlen
    expected = model(batch.clips, batch.query)
    for size in (16, 64, 512):
        for pad in (0, 77):
            grid = torch.full((4, size), pad)
            grid[:, :longest] = batch.query.to_padded(fill=pad)
            mask = torch.arange(size) < batch.query.lengths()[:, None]
            out = model(batch.clips, PackedBatch.pack(grid, mask))
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.quick
def test_embeddings_are_the_projected_mean():
    model = tiny().eval()
    batch = batch_of(model, (2, 3))
    query = batch.query.with_data(model.tokens(batch.query.data))
    rows = model.predictor.rows(model.see(batch.clips), query).split()
    expected = torch.stack([F.normalize(model.predictor.out(r.mean(0)), dim=0) for r in rows])
    assert_parity("embeddings", model(batch.clips, batch.query), expected)
    alone = model(PackedBatch.from_list(batch.clips.split()[:1]))
    assert alone.shape == (1, 32) and not torch.allclose(alone[0], expected[0], atol=1e-3)


@pytest.mark.quick
def test_an_image_is_a_clip_of_its_copies():
    model = tiny().eval()
    images = torch.randn(3, 3, 16, 16)
    clips = still_clips(images, 2)
    assert clips.lengths().tolist() == [2, 2, 2]
    twice = torch.stack((images[1], images[1]))
    assert_parity("image", model(clips)[1:2], model(PackedBatch.from_list([twice])))


# What trains.


@pytest.mark.quick
@pytest.mark.parametrize("objective", ["infonce", "cosine", "l1", "l2"])
def test_objectives(objective):
    model = tiny(objective=objective)
    batch = batch_of(model)
    a, b = model(batch.clips, batch.query), model.embed_text(batch.target)
    if objective == "infonce":
        logits = a @ b.t() / 0.07
        own = torch.arange(4)
        expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2
    elif objective == "cosine":
        expected = 1 - F.cosine_similarity(a, b).mean()
    else:
        expected = (a - b).norm(p=int(objective[1]), dim=1).pow(int(objective[1])).mean()
    assert_parity("loss", model.loss(batch).embedding, expected)


@pytest.mark.quick
@pytest.mark.parametrize("objective", ["infonce", "l2"])
def test_an_empty_pair_has_no_loss_of_its_own(objective):
    model = tiny(objective=objective)
    batch = batch_of(model, (3, 0, 2))
    own = model.loss(batch).embedding
    a, b = model(batch.clips, batch.query), model.embed_text(batch.target)
    if objective == "l2":
        expected = (a - b).square().sum(1)[[0, 2]].mean()
    else:
        logits = a @ b.t() / 0.07
        rows, columns = (x.log_softmax(1).diagonal()[[0, 2]] for x in (logits, logits.t()))
        expected = -(rows + columns).mean() / 2
    assert_parity("loss", own, expected)


@pytest.mark.quick
def test_the_temperature_is_learned_and_bounded():
    model = tiny()
    batch = batch_of(model)
    model.loss(batch).total.backward()
    assert model.log_scale.grad != 0
    with torch.no_grad():
        model.log_scale.fill_(20.0)
    a, b = model(batch.clips, batch.query), model.embed_text(batch.target)
    own = torch.arange(4)
    logits = 100 * a @ b.t()
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2
    assert_parity("loss", model.loss(batch).embedding, expected)


@pytest.mark.quick
def test_rates_and_what_never_moves():
    """Acceptance 4: Y at 0.05 of the rate; X and the token table keep their bits over 20 steps."""
    model = tiny()
    groups = param_groups(model, 2e-3, weight_decay=0.1)
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    for name, p in model.named_parameters():
        if name.startswith(("vision.", "tokens.")):
            assert id(p) not in rates and not p.requires_grad, name
        else:
            assert rates[id(p)] == 2e-3 * (0.05 if name.startswith("text.") else 1.0), name
            assert decays[id(p)] == (0.1 if p.dim() > 1 else 0.0), name
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(groups)
    for step in range(20):
        optimizer.zero_grad()
        model.loss(batch_of(model, seed=step)).total.backward()
        optimizer.step()
    for name, p in model.named_parameters():
        frozen = name.startswith(("vision.", "tokens."))
        assert torch.equal(p, before[name]) == frozen, name


@pytest.mark.quick
def test_the_decoder_moves_nothing_but_itself():
    model = tiny()
    model.loss(batch_of(model)).text.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == name.startswith("decoder."), name


@pytest.mark.quick
def test_decoder_loss_is_that_of_each_text_alone():
    model = tiny().eval()
    answers = batch_of(model).answer
    embeddings = F.normalize(torch.randn(4, 32), dim=1)
    table = model.tokens.weight
    losses, count = torch.zeros(()), 0
    for e, ids in zip(embeddings, answers.split(), strict=True):
        x = torch.cat((model.decoder.expand(e).view(2, -1), table[ids]))
        hidden = model.decoder.layers(PackedBatch.from_list([x])).data[2:]
        losses = losses + F.cross_entropy(hidden[:-1] @ table.t(), ids[1:], reduction="sum")
        count += len(ids) - 1
    assert_parity("loss", model.decoder.loss(embeddings, answers, table), losses / count)


@pytest.mark.quick
def test_generation_is_the_likeliest_token_after_token():
    """With caches what a full pass over prefix and text so far gives; and the calls are counted."""
    model = tiny().eval()
    embeddings, table = F.normalize(torch.randn(3, 32), dim=1), model.tokens.weight
    texts = model.generate(embeddings, max_new_tokens=6)
    assert model.decoder.calls == 3
    for e, text in zip(embeddings, texts, strict=True):
        ids = torch.tensor([model.config.bos_id])
        for token in text:
            x = torch.cat((model.decoder.expand(e).view(2, -1), table[ids]))
            best = (model.decoder.layers(PackedBatch.from_list([x])).data[-1] @ table.t()).argmax()
            assert best == token
            ids = torch.cat((ids, best[None]))
    with pytest.raises(ValueError, match="no decoder; build it with decoder_depth >= 1"):
        tiny(decoder_depth=0).generate(embeddings)


# One interface.


@pytest.mark.quick
def test_classification_and_retrieval_compare_the_same_embeddings():
    model = tiny().eval()
    batch = batch_of(model)
    scores = model.classify(batch.clips, batch.target, batch.query)
    expected = model(batch.clips, batch.query) @ model.embed_text(batch.target).t()
    assert_parity("scores", scores, expected)
    assert scores.abs().max() <= 1 + 1e-5
    found = model.retrieve(batch.target, batch.clips, batch.query)
    assert_parity("retrieval", found, scores.t())


@pytest.mark.quick
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "infonec"}, "objective 'infonec' is unknown; did you mean 'infonce'"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"text_lr_ratio": -0.1}, "text_lr_ratio must be >= 0 and finite, got -0.1"),
        ({"prefix": 0}, "prefix >= 1, got 1 and 0"),
        ({"eos_id": 128}, "eos_id = 128 is no id of a vocabulary of 128"),
    ],
    ids=str,
)
def test_refuses_a_config_that_is_none(fields, message):
    with pytest.raises(ValueError, match=message):
        encfast.create("vl_jepa/tiny", device="meta", **fields)


@pytest.mark.quick
def test_refuses_what_does_not_fit():
    model = tiny()
    with pytest.raises(ValueError, match=r"clip 1 has 3 frames, expected a multiple of 2"):
        model(PackedBatch.from_lengths(torch.zeros(5, 3, 16, 16), [2, 3]))
    with pytest.raises(ValueError, match=r"clips has frames of \(8, 8\), expected \(16, 16\)"):
        model(PackedBatch.from_lengths(torch.zeros(2, 3, 8, 8), [2]))
    clips = PackedBatch.from_lengths(torch.zeros(2, 3, 16, 16), [2])
    with pytest.raises(ValueError, match="other has 2 sequences, expected 1"):
        model(clips, PackedBatch.from_lengths(torch.zeros(3, dtype=torch.int64), [1, 2]))
    with pytest.raises(ValueError, match=r"image_size is \(20, 16\), expected multiples of \(8, 8"):
        dataclasses.replace(TINY.vision, image_size=(20, 16))
    with pytest.raises(ValueError, match="heads have 4 channels, expected 6 at least"):
        dataclasses.replace(TINY.vision, num_heads=8)
