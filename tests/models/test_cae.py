"""CAE: parity with dense formulas and BeitModel, and the mechanisms its paper defines it by."""

import copy

import pytest
import torch
import torch.nn.functional as F

import encfast
from encfast import PackedBatch, losses, weights
from encfast.data import ImageBatch
from encfast.models._cae_regressor import RegressorBlock, key_plan
from encfast.models.cae import Cae, PatchCodebook
from encfast.patch_mask import PatchMask
from encfast.weights import Tied

from . import dense_cae
from .common import assert_compiles, assert_parity
from .dense_cae import DenseCae

DEEP = {"regressor_depth": 2, "decoder_depth": 2}
V2 = {"objective": "features", "decoder_depth": 0}
PATCHES = 24  # of tiny


def tiny(**overrides) -> Cae:
    return encfast.create("cae/tiny", **overrides)


def twins(**overrides) -> tuple[Cae, DenseCae]:
    model = tiny(**DEEP | overrides)
    dense = DenseCae(model.config)
    weights.load(model, dense.state_dict(), model.reference_names())
    return model, dense


def drawn(model: Cae, count: int = 3, seed: int = 0) -> ImageBatch:
    return model.example_batch(torch.Generator().manual_seed(seed), batch_size=count)


def hidden_of(batch: ImageBatch) -> torch.Tensor:
    return batch.mask.hidden_grid().view(len(batch.images), -1)


def repainted(batch: ImageBatch, chosen: torch.Tensor) -> torch.Tensor:
    """The images with other pixels in the patches `chosen` [B, P]."""
    size = batch.images.shape[2:]
    blocks = chosen.view(-1, 1, size[0] // 4, size[1] // 4).float()
    where = F.interpolate(blocks, size=size, mode="nearest").bool()
    return torch.where(where, torch.randn_like(batch.images), batch.images)


# Parity.


@pytest.mark.quick
@pytest.mark.parametrize("decoder_dim", [32, 48], ids=["projected", "one-width"])
def test_pretraining_is_that_of_dense_formulas(decoder_dim):
    model, dense = twins(decoder_dim=decoder_dim)
    batch = drawn(model)
    hidden, ids = hidden_of(batch), batch.targets.view(3, -1)
    scores, latents = dense(batch.images, hidden)
    assert_parity("scores", model(batch.images, batch.mask), scores.flatten(0, 1))
    _, predicted = model.regress(batch.images, batch.mask)
    assert_parity("latents", predicted.data, latents.flatten(0, 1))
    tokens, alignment = dense.losses(batch.images, hidden, ids)
    loss = model.loss(batch)
    assert_parity("tokens", loss.tokens, tokens)
    assert_parity("alignment", loss.alignment, alignment)
    loss.total.backward()
    exact = copy.deepcopy(dense).double()
    tokens, alignment = exact.losses(batch.images.double(), hidden, ids)
    (tokens + 2 * alignment).backward()
    assert_gradients(model, exact)


@pytest.mark.quick
def test_features_are_those_of_dense_formulas():
    model, dense = twins(**V2)
    batch = drawn(model)
    hidden, features = hidden_of(batch), batch.targets.view(3, 1 + PATCHES, -1)
    predicted = model(batch.images, batch.mask).view_as(features)
    expected = dense(batch.images, hidden)[0]  # class token, visible, hidden
    for b in range(3):
        order = torch.cat((torch.zeros(1), 1 + (~hidden[b]).nonzero()[:, 0].float()))
        order = torch.cat((order, 1 + hidden[b].nonzero()[:, 0].float())).long()
        assert_parity(f"features of image {b}", predicted[b][order], expected[b])
    reference = dense.feature_loss(batch.images, hidden, features)
    loss = model.loss(batch)
    assert loss.total is loss.features and loss.alignment is None
    assert_parity("loss", loss.total, reference)
    loss.total.backward()
    exact = copy.deepcopy(dense).double()
    exact.feature_loss(batch.images.double(), hidden, features.double()).backward()
    assert_gradients(model, exact)


def assert_gradients(model: Cae, exact: DenseCae) -> None:
    """Every gradient is that of the float64 oracle, but for 1e-5 of its largest entry.

    The biases of queries and of values are one vector here: a query's part alone is a difference
    of sums that nearly cancel. That of a norm in front of keys is zero, because one vector more for
    every key shifts all scores of a query alike.
    """
    ours = {n: p.grad for n, p in model.named_parameters()}
    theirs = {n: p.grad for n, p in exact.named_parameters() if p.requires_grad}
    expected = {e.ours: e.join(theirs) for e in model.reference_names() if e.ours in ours}
    assert expected.keys() == ours.keys()
    largest = max(g.abs().max().item() for g in expected.values())
    for name, reference in expected.items():
        scale = reference.abs().max().item()
        if name.endswith("qkv.q_bias"):
            scale = max(scale, expected[name[:-6] + "v_bias"].abs().max().item())
        elif name.endswith("attn.q.bias"):
            scale = max(scale, expected[name[:-6] + "v.bias"].abs().max().item())
        elif name.endswith("norm_k.bias"):
            assert scale < 1e-12 * largest
            scale = largest
        error = (ours[name] - reference).abs().max().item()
        assert error <= 1e-5 * scale, f"gradient of {name}: {error:.2e} of {scale:.2e}"


@pytest.mark.quick
def test_weights_go_out_as_they_came_in():
    model, dense = twins()
    theirs, reference = weights.export(model, model.reference_names()), dense.state_dict()
    assert theirs.keys() == reference.keys()
    assert all(torch.equal(theirs[name], reference[name]) for name in theirs)


@pytest.mark.quick
def test_encoder_is_beit_where_everything_is_visible():
    transformers = pytest.importorskip("transformers")
    model = tiny(image_size=(24, 24))
    c = model.config
    beit = transformers.BeitModel(
        transformers.BeitConfig(
            image_size=24,
            patch_size=4,
            hidden_size=c.dim,
            num_hidden_layers=c.depth,
            num_attention_heads=c.num_heads,
            intermediate_size=c.ffn_dim,
            layer_norm_eps=c.norm_eps,
            layer_scale_init_value=c.layer_scale,
            use_absolute_position_embeddings=True,
            use_relative_position_bias=False,
            use_mean_pooling=False,
            use_mask_token=False,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="eager",
        ),
        add_pooling_layer=False,
    ).eval()
    with torch.no_grad():
        for p in beit.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs, ours = beit.state_dict(), model.encoder.state_dict()
    with torch.no_grad():
        for entry in beit_names(c.depth):
            source = entry.join(theirs)
            ours[entry.ours].copy_(source.reshape(ours[entry.ours].shape))
    assert len(theirs) == sum(len(entry.theirs) for entry in beit_names(c.depth))
    images = torch.randn(2, 3, 24, 24)
    expected = beit(images).last_hidden_state
    assert_parity("last hidden rows", model.encode(images).data, expected.flatten(0, 1))


def beit_names(depth: int) -> list[Tied]:
    pairs = [
        ("class_token", "embeddings.cls_token"),
        ("positions.table", "embeddings.position_embeddings"),
        ("embed.proj.weight", "embeddings.patch_embeddings.projection.weight"),
        ("embed.proj.bias", "embeddings.patch_embeddings.projection.bias"),
        ("norm.weight", "layernorm.weight"),
        ("norm.bias", "layernorm.bias"),
    ]
    entries = []
    for i in range(depth):
        a, b = f"stack.blocks.{i}", f"layers.{i}"
        qkv = tuple(f"{b}.attention.{name}_proj.weight" for name in "qkv")
        entries.append(Tied(f"{a}.attn.qkv.weight", qkv))
        pairs += [(f"{a}.attn.qkv.{n}_bias", f"{b}.attention.{n}_proj.bias") for n in "qv"]
        pairs += [(f"{a}.scale{n}", f"{b}.lambda_{n}") for n in (1, 2)]
        for kind in ("weight", "bias"):
            pairs += [
                (f"{a}.norm1.{kind}", f"{b}.layernorm_before.{kind}"),
                (f"{a}.norm2.{kind}", f"{b}.layernorm_after.{kind}"),
                (f"{a}.attn.out.{kind}", f"{b}.attention.o_proj.{kind}"),
                (f"{a}.mlp.up.{kind}", f"{b}.mlp.fc1.{kind}"),
                (f"{a}.mlp.down.{kind}", f"{b}.mlp.fc2.{kind}"),
            ]
    return entries + [Tied(ours, (theirs,)) for ours, theirs in pairs]


# What each part sees.


@pytest.mark.quick
def test_hidden_pixels_reach_the_alignment_target_alone():
    model = tiny()
    batch = drawn(model)
    mask, hidden = batch.mask, hidden_of(batch)
    for chosen, target_changes in ((hidden, True), (~hidden, False)):
        images = repainted(batch, chosen)
        assert not torch.equal(images, batch.images)
        pairs = [
            (model.encode(x, mask).data, model.regress(x, mask)[1].data, model(x, mask))
            for x in (batch.images, images)
        ]
        for before, after in zip(*pairs, strict=True):
            assert torch.equal(before, after) == target_changes
        targets = [model.latent_target(x, mask) for x in (batch.images, images)]
        assert torch.equal(*targets) != target_changes


@pytest.mark.quick
def test_images_do_not_see_each_other():
    model = tiny()
    batch = drawn(model)
    images = batch.images.clone()
    images[[0, 2]] = torch.randn_like(images[:2])
    half = PATCHES // 2
    before, after = (model(x, batch.mask)[half : 2 * half] for x in (batch.images, images))
    assert torch.equal(before, after)


@pytest.mark.quick
def test_queries_attend_to_each_other_and_not_to_the_class_token():
    model, _ = twins(regressor_depth=1)
    batch = drawn(model)
    mask = batch.mask
    encoded, latents = model.regress(batch.images, mask)
    places = mask.patches_of(mask.hidden) + 1
    table = model.positions()

    def regressed(encoded, table):
        return model.regressor(encoded, mask, table[places], table).data

    moved = table.clone()
    moved[places[0]] += torch.randn(table.shape[1])
    change = (regressed(encoded, moved) - latents.data).abs().amax(-1)
    others = (places != places[0]) & (torch.arange(len(places)) < PATCHES // 2)
    assert change[others].min() > 1e-4, "another query's position changed nothing"

    other_class = encoded.clone()
    other_class[mask.visible_plan().cu_seqlens[:-1].long()] = torch.randn(encoded.shape[1])
    assert torch.equal(regressed(other_class, table), latents.data)
    other_patch = encoded.clone()
    other_patch[1] += torch.randn(encoded.shape[1])
    assert not torch.equal(regressed(other_patch, table), latents.data)


def uneven_mask() -> PatchMask:
    """Images with 3, 0, 6 and 2 hidden of 6 patches."""
    hidden = torch.zeros(4, 6, dtype=torch.bool)
    hidden[0, [0, 2, 5]] = hidden[2] = hidden[3, 3:5] = True
    return PatchMask.from_hidden(hidden)


@pytest.mark.quick
def test_regressor_block_is_its_formula():
    """Over images with other numbers of hidden patches, none and all among them."""
    model, dense = twins(regressor_depth=1)
    block, naive = model.regressor.blocks[0], dense.regresser.regressor_blocks[0]
    assert isinstance(block, RegressorBlock)
    mask, dim = uneven_mask(), model.config.decoder_dim
    table, encoded, q = torch.randn(7, dim), torch.randn(13 + 4, dim), torch.randn(11, dim)
    places = mask.patches_of(mask.hidden) + 1
    out = block(mask.hidden_batch(q), encoded, key_plan(mask), table[places], table)
    rows = PackedBatch(encoded, mask.visible_plan().cu_seqlens, 7).split()
    visible_places = mask.patches_of(mask.visible).split(mask.cu_visible.diff().tolist())
    hidden_places = places.split(mask.cu_hidden.diff().tolist())
    expected = []
    for b, queries in enumerate(mask.hidden_batch(q).split()):
        kv = torch.cat((rows[b][1:], queries))[None]
        at_keys = table[torch.cat((visible_places[b] + 1, hidden_places[b]))][None]
        expected.append(naive(queries[None], kv, table[hidden_places[b]][None], at_keys)[0])
    assert_parity("block", out.data, torch.cat(expected), tolerance=1e-6)


@pytest.mark.quick
def test_keys_are_visible_latents_and_queries_of_the_same_image():
    mask = uneven_mask()
    plan = key_plan(mask)
    assert plan.cu_seqlens.tolist() == [0, 6, 12, 18, 24] and plan.max_seqlen == 6
    # Rows of the encoder: 4, 7, 1 and 5 with the class rows 0, 4, 11 and 12; then the queries.
    encoder, query = [[1, 2, 3], [5, 6, 7, 8, 9, 10], [], [13, 14, 15, 16]], 17
    for b, rows in enumerate(plan.index.view(4, 6).tolist()):
        queries = list(range(query, query + 6 - len(encoder[b])))
        query += len(queries)
        assert sorted(rows) == [*encoder[b], *queries]
    assert plan.add_index.view(4, 6).tolist() == [[1, 2, 3, 4, 5, 6]] * 4


# The loss.


@pytest.mark.quick
def test_loss_is_cross_entropy_and_twice_the_alignment():
    model, _ = twins()
    batch = drawn(model)
    loss = model.loss(batch)
    assert_parity("total", loss.total, loss.tokens + 2 * loss.alignment, tolerance=1e-6)
    scores = model(batch.images, batch.mask)
    assert_parity("tokens", loss.tokens, F.cross_entropy(scores, batch.targets))
    target = model.latent_target(batch.images, batch.mask)
    assert not target.requires_grad
    latents = model.regress(batch.images, batch.mask)[1].data
    assert_parity("alignment", loss.alignment, F.mse_loss(latents, target))
    encoder = list(model.encoder.parameters())
    for term in (loss.tokens, loss.alignment):
        grads = torch.autograd.grad(term, encoder, retain_graph=True)
        assert all(g.abs().max() > 0 for g in grads)
    weighted = tiny(**DEEP, alignment_weight=0.5)
    weighted.load_state_dict(model.state_dict())
    expected = loss.tokens + 0.5 * loss.alignment
    assert_parity("total", weighted.loss(batch).total, expected, tolerance=1e-6)


@pytest.mark.quick
def test_the_target_passes_drop_path_while_training():
    """As in the published code, whose copy of the encoder is in training mode."""
    model = tiny(**DEEP, drop_path=0.5, layer_scale=1.0)
    batch = drawn(model)
    blocks = model.regressor.blocks
    assert [b.drop_path1.p for b in model.encoder.stack.blocks] == [0.0, 0.5]
    assert [b.drop_path2.p for b in blocks] == [0.0, 0.5]
    targets = [model.latent_target(batch.images, batch.mask) for _ in range(4)]
    assert any(not torch.equal(targets[0], t) for t in targets[1:])
    model.eval()
    targets = [model.latent_target(batch.images, batch.mask) for _ in range(2)]
    assert torch.equal(*targets)


# Masks and tokens.


@pytest.mark.quick
def test_masks_hide_exactly_half_in_connected_blocks():
    model = encfast.create("cae/base", device="meta")
    model.encoder.embed.proj.weight = torch.nn.Parameter(torch.zeros(1))  # where masks go
    mask = model.draw_mask(1000, generator=torch.Generator().manual_seed(0))
    hidden = mask.hidden_grid().view(1000, 14, 14)
    assert (hidden.sum((1, 2)) == 98).all() and mask.max_hidden == mask.max_visible == 98
    same = torch.cat(
        [
            (hidden[:, 1:] == hidden[:, :-1]).flatten(1),
            (hidden[:, :, 1:] == hidden[:, :, :-1]).flatten(1),
        ],
        1,
    ).float()
    assert same.mean() > 0.85, f"share of like neighbours {same.mean():.3f}"
    assert hidden.any(0).all() and not hidden.all(0).any(), "some place never changes"
    again = model.draw_mask(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mask.hidden, again.hidden)


@pytest.mark.quick
def test_codebook_gives_the_nearest_code():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5000, 12, generator=generator)
    codebook = PatchCodebook.random(40, 12, generator=generator)
    assert codebook.size == 40 and not list(codebook.parameters())
    assert torch.equal(codebook(rows), torch.cdist(rows, codebook.codes).argmin(1))
    assert codebook(rows[:0]).shape == (0,)
    assert len(codebook(rows).unique()) > 20
    with pytest.raises(ValueError, match=r"rows has shape \(2, 3\), expected \[M, 12\]"):
        codebook(torch.zeros(2, 3))


@pytest.mark.quick
def test_k_means_finds_clusters():
    generator = torch.Generator().manual_seed(0)
    centres = 5 * torch.randn(16, 12, generator=generator)
    owner = torch.arange(800) % 16
    rows = centres[owner] + 0.1 * torch.randn(800, 12, generator=generator)

    def error(steps: int) -> float:
        book = PatchCodebook.k_means(
            rows, 16, steps=steps, generator=torch.Generator().manual_seed(1)
        )
        return (rows - book.codes[book(rows)]).square().mean().item()

    errors = [error(steps) for steps in (0, 2, 20)]
    assert errors[0] > errors[1] >= errors[2]
    assert PatchCodebook.k_means(rows[:16], 16, steps=3)(rows[:16]).unique().numel() == 16
    repeated = PatchCodebook.k_means(torch.ones(9, 2), 3)
    assert repeated.codes.isfinite().all()
    with pytest.raises(ValueError, match="rows has 3 patches, expected 4 or more"):
        PatchCodebook.k_means(rows[:3], 4)


@pytest.mark.quick
def test_ids_of_any_tokenizer_come_with_the_batch():
    """A grid of ids per image, as a discrete VAE returns it."""
    model = tiny()
    batch = drawn(model)
    grid = torch.randint(64, (3, *model.config.grid))
    loss = model.loss(ImageBatch(batch.images, batch.mask, grid.flatten()[batch.mask.hidden]))
    scores = model(batch.images, batch.mask)
    reference = F.cross_entropy(scores, grid.flatten(1)[hidden_of(batch)])
    assert_parity("tokens", loss.tokens, reference)


# Classification.


@pytest.mark.quick
@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_classifier_pools_and_then_norms(pooling):
    model = tiny(task="classification", pooling=pooling)
    torch.nn.init.normal_(model.head.weight)
    images, encoder = torch.randn(3, 3, 24, 16), model.encoder
    rows = encoder.stack(encoder.embedded(images, encoder.all_visible(images))).data
    rows = rows.view(3, 1 + PATCHES, -1)
    pooled = rows[:, 1:].mean(1) if pooling == "mean" else rows[:, 0]
    assert_parity("scores", model(images), model.head(encoder.norm(pooled)))
    loss = model.loss(drawn(model))
    assert loss.total is loss.classification
    loss.total.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.quick
@pytest.mark.parametrize("pooling", ["mean", "class", "attentive"])
def test_probes_leave_the_encoder_alone(pooling):
    pretrained, probe = tiny(), tiny(task="probing", pooling=pooling, drop_path=0.3)
    probe.load_encoder(pretrained.state_dict())
    batch = drawn(probe, 8)
    assert torch.equal(probe.encode(batch.images).data, pretrained.encode(batch.images).data)
    probe.loss(batch).total.backward()
    assert all(p.grad is None for p in probe.encoder.parameters())
    trained = [n for n, p in probe.named_parameters() if p.requires_grad]
    assert trained and not any(n.startswith("encoder") for n in trained)
    features: list[torch.Tensor] = []
    probe.head.register_forward_hook(lambda _, inputs, __: features.append(inputs[0]))
    probe(batch.images)
    if pooling != "attentive":  # whose query starts from zero: all patches weigh alike
        variance, mean = torch.var_mean(features[0], 0, correction=0)
        assert mean.abs().max() < 1e-4 and 0.9 < variance.min() <= variance.max() < 1.001


@pytest.mark.quick
def test_attentive_probe_is_one_cross_attention():
    model = tiny(task="probing", pooling="attentive").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    pool, images = model.pool, torch.randn(3, 3, 24, 16)
    x = model.encode(images).data.view(3, 1 + PATCHES, -1)[:, 1:]
    a = pool.attn
    query = a.q(pool.norm_q(pool.query)).expand(3, 1, -1)
    found = dense_cae.softmax_attention(query, a.k(pool.norm_k(x)), a.v(pool.norm_v(x)), 4)
    assert a.k.bias is None and a.q.bias is not None and a.v.bias is not None
    pooled = a.out(found[:, 0])
    expected = model.head(pooled / (1 + 1e-6) ** 0.5)  # a fresh batch norm has seen nothing
    assert_parity("scores", model(images), expected)
    model.loss(drawn(model)).total.backward()
    assert pool.query.grad.abs().max() > 0


# Everything else.


@pytest.mark.quick
def test_published_sizes():
    """Millions of parameters of encoder, regressor, decoder, head."""
    encoders = {"ti": 5.5, "small": 21.6, "base": 85.7, "large": 303.1}
    for name, expected in encoders.items():
        model = encfast.create(f"cae/{name}", device="meta")
        assert count(model.encoder) == pytest.approx(expected, rel=5e-3)
    base = encfast.create("cae/base", device="meta")
    assert count(base.regressor) == pytest.approx(28.4, rel=5e-3)
    assert count(base.decoder) == pytest.approx(34.7, rel=5e-3)
    assert count(base.decoder.head) == pytest.approx(6.3, rel=5e-3)
    v2 = encfast.create("cae/base-v2", device="meta")
    assert len(v2.decoder.stack.blocks) == 0 and v2.decoder.head.out_features == 512
    large = encfast.create("cae/large", device="meta")
    assert large.encoder.stack.blocks[0].layer_scale == 1e-5
    assert isinstance(large.project, torch.nn.Identity)


def count(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.quick
def test_weights_start_from_the_published_distributions():
    model = tiny(dim=96, decoder_dim=96)
    weight = model.encoder.stack.blocks[1].mlp.up.weight
    bound = (6 / (96 + 96)) ** 0.5
    assert 0.95 * bound < weight.abs().max() <= bound
    for small in (model.encoder.embed.proj.weight, model.regressor.mask_token):
        assert 0.015 < small.abs().max() <= 0.02
    scaled = tiny(**DEEP, dim=96, decoder_dim=96, scaled_init=True)
    parts = scaled.encoder.stack, scaled.regressor, scaled.decoder.stack
    for blocks in (part.blocks for part in parts):
        for i, block in enumerate(blocks):
            lower = 0.02 / (2 * (i + 1)) ** 0.5
            for layer, bound in ((block.mlp.up, 0.02), (block.attn.out, lower)):
                assert layer.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
            assert block.mlp.down.weight.abs().max().item() == pytest.approx(lower, rel=0.01)


@pytest.mark.quick
def test_visible_patches_alone_are_computed():
    model = tiny()
    batch, counts = drawn(model), []
    model.encoder.norm.register_forward_hook(
        lambda _, inputs, __: counts.append(inputs[0].shape[0])
    )
    model.loss(batch)
    half = PATCHES // 2
    assert counts == [3 * (1 + half), 3 * (1 + half)]  # the visible, then the target's


@pytest.mark.quick
def test_uint8_images_are_normalised():
    model = tiny()
    images = torch.randint(256, (2, 3, 24, 16), dtype=torch.uint8)
    c = model.config
    mean, std = (torch.tensor(v)[:, None, None] for v in (c.pixel_mean, c.pixel_std))
    assert_parity("rows", model.encode(images).data, model.encode((images / 255 - mean) / std).data)


@pytest.mark.quick
def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="pooling 'attentive' is for task 'probing'"):
        tiny(pooling="attentive")
    with pytest.raises(ValueError, match="task 'probe' is unknown; did you mean 'probing'"):
        tiny(task="probe")
    with pytest.raises(ValueError, match="decoder_depth=1 does not go with objective 'features'"):
        tiny(objective="features")
    with pytest.raises(ValueError, match=r"image_size is \(24, 18\), expected multiples of \(4"):
        tiny(image_size=(24, 18))
    model = tiny()
    with pytest.raises(ValueError, match=r"needs batch.targets, which is None"):
        model.loss(ImageBatch(torch.zeros(1, 3, 24, 16), drawn(model).mask))
    with pytest.raises(ValueError, match=r"images has size \(24, 24\), expected \(24, 16\)"):
        model.encode(torch.zeros(1, 3, 24, 24))
    with pytest.raises(ValueError, match="mask has 72 patches, expected 24 for each of 2 images"):
        model.encode(torch.zeros(2, 3, 24, 16), drawn(model).mask)
    with pytest.raises(ValueError, match="published names are those of task 'masked-image'"):
        tiny(task="classification").reference_names()
    with pytest.raises(ValueError, match=r"codes has shape \(3,\), expected \[K, Q\] with K >= 1"):
        PatchCodebook(torch.zeros(3))


@pytest.mark.quick
def test_without_hidden_patches_nothing_is_lost():
    model = tiny()
    images = torch.randn(2, 3, 24, 16)
    nothing = torch.empty(0, dtype=torch.int64)
    loss = model.loss(ImageBatch(images, PatchMask.all_visible(2, PATCHES), nothing))
    assert loss.total == 0
    loss.total.backward()
    assert losses.scaled_cosine_error(torch.zeros(0, 3), torch.zeros(0, 3), beta=1.0) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        DEEP,
        V2,
        {"task": "classification"},
        {"task": "probing"},
        {"task": "probing", "pooling": "attentive"},
    ],
    ids=["tokens", "features", "classification", "probe", "attentive-probe"],
)
def test_compiles_without_a_break(overrides):
    """Probes took four graphs: their batch norm's floats were symbols, and all was traced twice."""
    model = tiny(**overrides)
    assert_compiles(model, [drawn(model, count) for count in (3, 5, 4)])
