"""TriBERT: parity of the encoder, the boundary rule against a loop, triplets and their loss."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import encfast
from encfast import PackedBatch, weights
from encfast.models.tribert import (
    TriBertConfig,
    TripletBatch,
    boundary_distances,
    boundary_f1,
    largest_gaps,
    sample_triplets,
)

from .common import assert_gradient_parity, assert_parity, ragged_lengths, random_tokens

LENGTHS = ragged_lengths(7)  # up to 300 tokens: beyond the last bucket of positions
VOCAB = 97


def twins(encoder):
    """transformers' model, and ours with the same random weights."""
    transformers = pytest.importorskip("transformers")
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 80,
        "max_position_embeddings": 302,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": "eager",
    }
    ours = {"vocab_size": VOCAB, "dim": 48, "num_heads": 3, "ffn_dim": 80, "max_positions": 300}
    if encoder == "mpnet":
        config = transformers.MPNetConfig(**fields, layer_norm_eps=1e-5)
        theirs = transformers.MPNetModel(config, add_pooling_layer=False)
        model = encfast.create("tribert/tiny", dropout=0.0, attn_dropout=0.0, **ours)
    else:
        theirs = transformers.BertModel(transformers.BertConfig(**fields), add_pooling_layer=False)
        ours["max_positions"] = 302
        model = encfast.create("tribert/tiny-bert", dropout=0.0, attn_dropout=0.0, **ours)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.3 * torch.randn_like(p))
    weights.load(model, theirs.state_dict(), model.reference_names())
    return model, theirs.train()


def padded_inputs(tokens):
    mask = torch.arange(tokens.max_seqlen) < tokens.lengths()[:, None]
    return {
        # The id of padding says to MPNet where a sentence ends.
        "input_ids": tokens.to_padded(fill=1).long(),
        "attention_mask": mask.long(),
    }, mask


@pytest.mark.quick
@pytest.mark.parametrize("encoder", ["mpnet", "bert"])
def test_the_encoder_is_that_of_transformers(encoder):
    model, theirs = twins(encoder)
    tokens = random_tokens(LENGTHS, VOCAB - 2)
    tokens = tokens.with_data(tokens.data + 2)  # no padding among the words
    grid, mask = padded_inputs(tokens)
    want = theirs(**grid).last_hidden_state
    hidden = model.hidden(tokens)
    assert_parity("hidden rows", hidden.data, want[mask])
    pooled = F.normalize((want * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)
    assert_parity("embeddings", model(tokens), pooled)
    direction = torch.randn_like(pooled)
    (model(tokens) * direction).sum().backward()
    (pooled * direction).sum().backward()
    assert_gradient_parity(model, theirs, model.reference_names())


@pytest.mark.quick
def test_every_part_of_the_relative_bias_counts():
    model = encfast.create("tribert/tiny", dropout=0.0, attn_dropout=0.0)
    tokens = random_tokens([100, 7, 0, 1], 500)
    before = model(tokens)
    with torch.no_grad():
        model.stack.relative.weight[:, 3] += 5.0  # keys three before the query
    change = (model(tokens) - before).abs().amax(1)
    assert (change > 1e-4).tolist() == [True, True, False, False]
    assert encfast.create("tribert/tiny-bert").stack.relative is None


@pytest.mark.quick
def test_sentences_do_not_see_each_other():
    model = encfast.create("tribert/tiny").eval()
    tokens = random_tokens([9, 0, 30, 1], 500)
    together = model(tokens)
    changed = tokens.data.clone()
    changed[9:39] = 7
    other = model(tokens.with_data(changed))
    assert torch.equal(other[[0, 1, 3]], together[[0, 1, 3]])
    assert not torch.equal(other[2], together[2])
    torch.testing.assert_close(together.norm(dim=1), torch.tensor([1.0, 0, 1, 1]))


# The rule.


def loop_distances(x, p):
    """One essay, as the paper writes it, with indices from 1."""
    n = len(x)
    found = []
    for i in range(1, n):
        left = [x[j - 1] for j in range(max(1, i - p + 1), i + 1)]
        right = [x[j - 1] for j in range(i + 1, min(n, i + p) + 1)]
        found.append((sum(left) / len(left) - sum(right) / len(right)).norm().item())
    return found


@pytest.mark.quick
@pytest.mark.parametrize("p", range(1, 7))
def test_distances_and_choices_against_a_loop(p):
    lengths = [*range(13), 5]
    essays = PackedBatch.from_lengths(F.normalize(torch.randn(sum(lengths), 6), dim=1), lengths)
    distances = boundary_distances(essays, p)
    gaps = largest_gaps(distances, essays, 3)
    for x, found, chosen in zip(
        essays.split(), distances.split(lengths), gaps.tolist(), strict=True
    ):
        want = loop_distances(x.double(), p)
        if len(x):
            assert found[-1] == -math.inf
            torch.testing.assert_close(found[:-1].double(), torch.tensor(want).double())
        rounded = [round(d, 4) for d in found[:-1].tolist()]
        order = sorted(range(len(want)), key=lambda i, d=rounded: -d[i])[:3]
        assert chosen == [i + 1 for i in order] + [0] * (3 - len(order))


@pytest.mark.quick
def test_the_boundary_of_a_hand_made_essay():
    """A A A B B: the third sentence is the last before the boundary; equal gaps go by place."""
    a, b = torch.tensor([1.0, 0]), torch.tensor([0, 1.0])
    essays = PackedBatch.from_lengths(torch.stack([a, a, a, b, b]), [5])
    assert largest_gaps(boundary_distances(essays, 1), essays, 3).tolist() == [[3, 1, 2]]
    assert largest_gaps(boundary_distances(essays, 2), essays, 3).tolist() == [[3, 2, 4]]


@pytest.mark.quick
def test_distances_that_differ_after_the_fourth_decimal_are_equal():
    essays = PackedBatch.from_lengths(torch.zeros(4, 1), [4])
    distances = torch.tensor([0.50001, 0.50004, 0.5002, -math.inf])
    assert largest_gaps(distances, essays, 2).tolist() == [[3, 1]]


@pytest.mark.quick
def test_f1_is_the_published_one():
    one, k = 1e-4, 3
    want = [2 * (1 / k + one) * (1 + one) / (1 / k + 1 + 2 * one), one]
    gold = torch.tensor([[4, 0], [2, 9]])
    got = boundary_f1(torch.tensor([[7, 4, 1], [3, 0, 0]]), gold)
    assert got == pytest.approx(sum(want) / 2)
    assert want[0] == pytest.approx(0.5, abs=1e-3)  # the ceiling with one boundary
    with pytest.raises(ValueError, match="essay 1 has no gold boundary"):
        boundary_f1(torch.tensor([[1], [1]]), torch.tensor([[1], [0]]))


# Triplets.


@pytest.mark.quick
def test_sampled_triplets_are_those_of_the_paper():
    authors = PackedBatch.from_list(
        [torch.tensor(a) for a in ([0, 0, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 1, 1, 0], [0], [0, 0])]
    )
    prompts = torch.tensor([3, 3, 8, 8, 3])
    generator = torch.Generator().manual_seed(0)
    triplets = sample_triplets(authors, prompts, 10_000, generator=generator)
    essay, author = authors.segment_ids()[triplets], authors.data[triplets]
    assert (essay == essay[:, :1]).all()
    assert (author[:, 0] == author[:, 1]).all() and (author[:, 0] != author[:, 2]).all()
    assert (triplets[:, 0] != triplets[:, 1]).all()
    assert 0.48 < (author[:, 0] == 0).double().mean() < 0.52
    # Prompts are drawn before essays; those that do not fit are drawn again.
    shares = Counter(essay[:, 0].tolist())
    assert set(shares) == {0, 1, 2}
    assert shares[0] / 1e4 == pytest.approx(2 / 7, abs=0.02)
    assert shares[2] / 1e4 == pytest.approx(3 / 7, abs=0.02)
    pairs = Counter(map(tuple, triplets[essay[:, 0] == 2, :2].tolist()))
    assert len(pairs) == 12 and max(pairs.values()) < 1.4 * min(pairs.values())


@pytest.mark.quick
def test_no_essay_with_two_authors_is_an_error():
    with pytest.raises(ValueError, match="no essay has two sentences"):
        sample_triplets(PackedBatch.from_list([torch.tensor([0, 1])]), torch.tensor([0]), 4)


@pytest.mark.quick
def test_the_loss_is_torchs_triplet_loss():
    model = encfast.create("tribert/tiny", dropout=0.0, attn_dropout=0.0)
    batch = model.example_batch(torch.Generator().manual_seed(0))
    e = model(batch.tokens)
    theirs = torch.nn.TripletMarginLoss(margin=1.0, p=2, eps=0)
    want = theirs(*(e[i] for i in batch.triplets.unbind(1)))
    torch.testing.assert_close(model.loss(batch).total, want, rtol=1e-6, atol=1e-6)


@pytest.mark.quick
def test_configs_and_published_sizes():
    with pytest.raises(ValueError, match="encoder must be 'mpnet' or 'bert', got 'gpt'"):
        TriBertConfig(encoder="gpt")
    with pytest.raises(ValueError, match="margin must be > 0"):
        TriBertConfig(margin=0.0)
    model = encfast.create("tribert/mpnet-base", device="meta")
    # all-mpnet-base-v2: 109 486 464 with its pooler, which sentences do not use.
    assert model.num_parameters() == 109_486_464 - 768 * 769
    with pytest.raises(ValueError, match="essays have 2 sentences, tokens has 3"):
        essays = PackedBatch.from_lengths(torch.zeros(2), [2])
        encfast.create("tribert/tiny").boundaries(random_tokens([1, 2, 3], 9), essays)


# Training on essays of two Markov chains of words.

WORDS = 40
NOISE = 0.6  # share of words that do not depend on the one before


class Essays:
    """Sentences of two authors: what follows a word is the first author's of the first 28 words,
    the second's of the last 28; other words are anyone's."""

    def __init__(self, count, boundaries, seed, part=(3, 6)):
        g = torch.Generator().manual_seed(1000)  # the authors are the same in all sets
        follow = torch.randint(28, (2, WORDS), generator=g) + torch.tensor([[0], [WORDS - 28]])
        g = torch.Generator().manual_seed(seed)
        ids, lengths, authors, gold = [], [], [], []
        for _ in range(count):
            cuts = int(torch.randint(boundaries[0], boundaries[1] + 1, (), generator=g))
            parts = torch.randint(part[0], part[1] + 1, (cuts + 1,), generator=g).tolist()
            first = int(torch.randint(2, (), generator=g))
            author = torch.cat([torch.full((n,), (first + i) % 2) for i, n in enumerate(parts)])
            for a in author.tolist():
                n = int(torch.randint(5, 13, (), generator=g))
                words = [int(torch.randint(WORDS, (), generator=g))]
                while len(words) < n:
                    random = torch.rand((), generator=g) < NOISE
                    new = torch.randint(WORDS, (), generator=g) if random else follow[a, words[-1]]
                    words.append(int(new))
                ids += words
                lengths.append(n)
            authors.append(author)
            ends = torch.tensor(parts).cumsum(0)[:-1]
            gold.append(F.pad(ends, (0, 3 - len(ends))))
        self.tokens = PackedBatch.from_lengths(torch.tensor(ids) + 2, lengths)
        self.authors, self.gold = PackedBatch.from_list(authors), torch.stack(gold)

    def score(self, model, p, k):
        found = model.eval().boundaries(self.tokens, self.authors, prototype=p, k=k)
        return boundary_f1(found, self.gold)

    def random_score(self, k):
        g = torch.Generator().manual_seed(5)
        distances = torch.rand(self.authors.total, generator=g)
        distances[self.authors.last_rows().long()] = -math.inf
        return boundary_f1(largest_gaps(distances, self.authors, k), self.gold)


def trained(essays, steps, seed=0):
    torch.manual_seed(seed)
    model = encfast.create("tribert/tiny", vocab_size=WORDS + 2, dropout=0.0, attn_dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)
    prompts, sentences = torch.zeros(essays.authors.batch_size).long(), essays.tokens.split()
    for _ in range(steps):
        rows = sample_triplets(essays.authors, prompts, 24)
        tokens = PackedBatch.from_list([sentences[i] for i in rows.flatten().tolist()])
        batch = TripletBatch(tokens, torch.arange(rows.numel()).view_as(rows))
        optimizer.zero_grad()
        model.loss(batch).total.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def encoders():
    """Before and after training."""
    essays = Essays(200, (1, 3), seed=1)
    return [trained(essays, steps) for steps in (0, 300)]


@pytest.mark.slow
def test_training_makes_boundaries_visible(encoders):
    test = Essays(150, (1, 3), seed=2)
    before, after = (test.score(model, 2, 3) for model in encoders)
    chance = test.random_score(3)
    print(f"F1@3 {before:.3f} -> {after:.3f}, at random {chance:.3f}")
    assert after >= 1.5 * before and after >= 2 * chance


@pytest.mark.slow
def test_wider_prototypes_find_more_single_boundaries(encoders):
    test = Essays(150, (1, 1), seed=3, part=(8, 14))
    scores = {p: test.score(encoders[1], p, 1) for p in (1, 2, 3, 4)}
    print({p: round(f1, 3) for p, f1 in scores.items()})
    assert scores[3] >= 1.1 * scores[1]
