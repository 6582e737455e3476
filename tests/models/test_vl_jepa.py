"""VL-JEPA: towers against transformers, what the predictor sees, what trains, one interface."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import encfast
from encfast import PackedBatch, weights
from encfast.models.vl_jepa import (
    TextEncoder,
    VisionEncoder,
    VlJepa,
    VlJepaBatch,
    gemma_names,
    llama_names,
    param_groups,
    still_clips,
    vision_names,
)

from .common import assert_gradient_parity, assert_parity

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


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.eval()


def compare(ours, theirs, names, out, expected, *, keep=()) -> None:
    """Outputs, and gradients of one weighted sum of them."""
    assert_parity("rows", out, expected)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (out * weight).sum().backward()
    assert_gradient_parity(ours, theirs, names)


# The towers are transformers'.


@pytest.mark.quick
@pytest.mark.parametrize("heads", [2, 4], ids=["D16", "D8"])
def test_vision_is_vjepa2(heads):
    """Published as it is: pairs whose elements turn by different angles, channels that stay."""
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(TINY.vision, image_size=(32, 32), num_heads=heads)
    theirs = transformers.VJEPA2Model(
        transformers.VJEPA2Config(
            patch_size=8,
            crop_size=32,
            frames_per_clip=6,
            hidden_size=config.dim,
            num_attention_heads=heads,
            num_hidden_layers=config.depth,
            mlp_ratio=config.ffn_dim / config.dim,
            pred_hidden_size=24,
            pred_num_attention_heads=2,
            pred_num_hidden_layers=1,
            attn_implementation="eager",
        )
    )
    shaken(theirs)
    ours, names = VisionEncoder(config), vision_names(config)
    tensors = theirs.state_dict()
    weights.load(ours, tensors, names, ignore=[n for n in tensors if n.startswith("predictor.")])
    clips = [torch.randn(n, 3, 32, 32) for n in (6, 2, 4)]
    out = ours(PackedBatch.from_list(clips))
    assert out.lengths().tolist() == [48, 16, 32]
    expected = torch.cat([theirs(c[None], skip_predictor=True)[0][0] for c in clips])
    compare(ours, theirs, names, out.data, expected)


@pytest.mark.quick
@pytest.mark.parametrize("first", [0, 2])
def test_predictor_is_the_last_layers_of_llama_without_a_mask(first):
    """Acceptance 1: to 1e-5, wavelengths scaled as Llama 3.2's where texts are long enough."""
    transformers = pytest.importorskip("transformers")
    llama = dataclasses.replace(
        TINY.predictor,
        rope_scaling=encfast.config.RopeScaling(factor=4.0, low=1.0, high=4.0, original=32),
    )
    theirs = transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=llama.vocab_size,
            hidden_size=llama.dim,
            intermediate_size=llama.ffn_dim,
            num_hidden_layers=first + llama.depth,
            num_attention_heads=llama.num_heads,
            num_key_value_heads=llama.num_kv_heads,
            rms_norm_eps=llama.norm_eps,
            max_position_embeddings=64,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": llama.rope_theta,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            attn_implementation="eager",
        )
    )
    shaken(theirs)
    theirs.layers = theirs.layers[first:]
    predictor = tiny(predictor=llama).predictor
    ours, names = predictor.layers, llama_names(llama.depth)
    tensors = theirs.state_dict()
    weights.load(ours, tensors, names, ignore=["embed_tokens.weight"])
    rows = [torch.randn(n, llama.dim) for n in (50, 1, 7)]
    out = ours(PackedBatch.from_list(rows)).data
    whole = [torch.zeros(1, 1, len(r), len(r)) for r in rows]  # added to the scores: all seen
    expected = torch.cat(
        [
            theirs(inputs_embeds=r[None], attention_mask=mask).last_hidden_state[0]
            for r, mask in zip(rows, whole, strict=True)
        ]
    )
    compare(ours, theirs, names, out, expected)


@pytest.mark.quick
def test_text_is_gemma_both_ways():
    """Windows on both sides in all but every second layer, which has another rotary base."""
    transformers = pytest.importorskip("transformers")
    c = dataclasses.replace(TINY.text, depth=4)
    theirs = transformers.Gemma3TextModel(
        transformers.Gemma3TextConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.dim,
            intermediate_size=c.ffn_dim,
            num_hidden_layers=c.depth,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            query_pre_attn_scalar=c.head_dim,
            rms_norm_eps=c.norm_eps,
            sliding_window=2 * c.half_window,
            layer_types=["sliding_attention", "full_attention"] * 2,
            use_bidirectional_attention=True,
            attn_implementation="eager",
        )
    )
    shaken(theirs)
    ours, names = TextEncoder(c, 8), gemma_names(c.depth)
    weights.load(ours, theirs.state_dict(), names, keep=["out.weight", "out.bias"])
    texts = [torch.randint(1, c.vocab_size, (n,)) for n in (23, 1, 9)]
    out = ours.rows(PackedBatch.from_list(texts)).data
    expected = torch.cat([theirs(t[None]).last_hidden_state[0] for t in texts])
    compare(ours, theirs, names, out, expected)


@pytest.mark.quick
def test_published_sizes():
    """8 of Llama 3.2 1B's layers with the norm are 486.57M; published are 490M and 1.6B."""
    model = encfast.create("vl_jepa/base", device="meta")

    def count(module, trained: bool = False) -> float:
        kept = (p for p in module.parameters() if p.requires_grad or not trained)
        return sum(p.numel() for p in kept) / 1e6

    assert count(model.predictor.layers) == pytest.approx(486.57, abs=0.005)
    assert count(model.predictor, trained=True) == pytest.approx(490, abs=2)
    assert count(model.vision) == pytest.approx(304, abs=0.2)
    assert count(model.tokens) == pytest.approx(262.7, abs=0.05)
    # EmbeddingGemma's published 308M hold two dense layers, 768 to 3072 and back.
    assert count(model.text) - 1.18 + 4.72 == pytest.approx(307.6, abs=0.1)
    assert count(model) == pytest.approx(1600, abs=20)
    assert not count(model.vision, trained=True) and not count(model.tokens, trained=True)
    for frames, rows in ((2, 256), (8, 1024), (16, 2048), (32, 4096)):
        assert frames // model.vision.depth * model.vision.num_patches == rows


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
        ({"prefix": 0}, "prefix >= 1, got 2 and 0"),
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
