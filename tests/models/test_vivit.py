"""ViViT: parity with a ViT per time index and a transformer over time; what freezing changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import encfast
from encfast import PackedBatch, weights
from encfast.data import ClipBatch
from encfast.models._vivit_weights import inflate
from encfast.models.vivit import Vivit
from encfast.weights import Tied

from .common import SIX_SHAPES, assert_compiles, assert_gradient_parity, assert_parity

# 8 time indices
SMALL = {"frames": 16, "dim": 48, "num_heads": 4, "ffn_dim": 80, "temporal_depth": 2}
ADAPTERS = ("none", "linear", "mlp", "attn")


def tiny(**overrides) -> Vivit:
    """A model whose head and adapter are not zero, so that everything reaches the scores."""
    model = encfast.create("vivit/tiny", **SMALL | overrides)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_((0.3 if name.startswith("head") else 0.1) * torch.randn_like(p))
    return model


def batch_of(model: Vivit, lengths=(5, 0, 8, 1), seed: int = 0) -> ClipBatch:
    return model.example_batch(torch.Generator().manual_seed(seed), lengths=lengths)


class TwoTransformers(nn.Module):
    """transformers' ViTModel on each time index, torch's TransformerEncoder on the class rows."""

    def __init__(self, config) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        depth, *patch = config.patch_size
        assert patch[0] == patch[1]
        tanh = config.activation == "gelu_tanh"
        self.depth = depth
        self.vit = transformers.ViTModel(
            transformers.ViTConfig(
                image_size=config.image_size,
                patch_size=patch[0],
                num_channels=config.channels * depth,  # a tubelet's frames are channels to it
                hidden_size=config.dim,
                num_hidden_layers=config.spatial_depth,
                num_attention_heads=config.num_heads,
                intermediate_size=config.ffn_dim,
                hidden_act="gelu_pytorch_tanh" if tanh else "gelu",
                layer_norm_eps=config.norm_eps,
                attn_implementation="eager",
            ),
            add_pooling_layer=False,
        )
        layer = nn.TransformerEncoderLayer(
            config.dim,
            config.num_heads,
            config.ffn_dim,
            dropout=0.0,
            activation=lambda x: F.gelu(x, approximate="tanh" if tanh else "none"),
            layer_norm_eps=config.norm_eps,
            batch_first=True,
            norm_first=True,
        )
        self.time = nn.TransformerEncoder(
            layer,
            config.temporal_depth,
            norm=nn.LayerNorm(config.dim, eps=config.norm_eps),
            enable_nested_tensor=False,
        )
        self.class_token = nn.Parameter(torch.randn(config.dim))
        self.table = nn.Parameter(torch.randn(1 + config.time, config.dim))
        self.head = nn.Linear(config.dim, config.num_labels)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.1 * torch.randn_like(p))

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        """Frames `[T, C, H, W]` of one clip -> `[K]`."""
        pieces = clip.unflatten(0, (-1, self.depth)).transpose(1, 2).flatten(1, 2)
        rows = self.vit(pieces).last_hidden_state[:, 0]
        x = torch.cat((self.class_token[None], rows)) + self.table[: 1 + len(rows)]
        return self.head(self.time(x[None])[0, 0])


def names_of_two(model: Vivit) -> list[Tied]:
    """What our tensors are called in `TwoTransformers`."""
    c = model.config
    channels = c.channels * c.patch_size[0]
    entries = []
    for tied in model.image_names():
        shapes = tied.shapes
        if tied.ours == "embed.proj.weight":
            shapes = (shapes[0], (c.dim, channels, *c.patch_size[1:]))
        entries.append(Tied(tied.ours, tuple(f"vit.{n}" for n in tied.theirs), shapes=shapes))
    pairs = {
        "temporal.class_token": "class_token",
        "temporal.positions.table": "table",
    }
    for kind in ("weight", "bias"):
        pairs |= {f"head.{kind}": f"head.{kind}", f"temporal.norm.{kind}": f"time.norm.{kind}"}
        for i in range(c.temporal_depth):
            ours, theirs = f"temporal.stack.blocks.{i}", f"time.layers.{i}"
            pairs |= {
                f"{ours}.attn.qkv.{kind}": f"{theirs}.self_attn.in_proj_{kind}",
                f"{ours}.attn.out.{kind}": f"{theirs}.self_attn.out_proj.{kind}",
                f"{ours}.mlp.up.{kind}": f"{theirs}.linear1.{kind}",
                f"{ours}.mlp.down.{kind}": f"{theirs}.linear2.{kind}",
                f"{ours}.norm1.{kind}": f"{theirs}.norm1.{kind}",
                f"{ours}.norm2.{kind}": f"{theirs}.norm2.{kind}",
            }
    return entries + [Tied(ours, (theirs,)) for ours, theirs in pairs.items()]


# Parity.


@pytest.mark.quick
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("depth", [1, 2])
def test_scores_are_those_of_two_transformers(activation, depth):
    model = tiny(activation=activation, patch_size=(depth, 8, 8), frames=8 * depth)
    theirs = TwoTransformers(model.config)
    weights.load(model, theirs.state_dict(), names_of_two(model))
    batch = batch_of(model, (5, 8, 1))
    expected = torch.stack([theirs(clip) for clip in batch.clips.split()])
    assert_parity("scores", model(batch.clips), expected)
    reference = F.cross_entropy(expected, batch.labels)
    loss = model.loss(batch)
    assert loss.total is loss.classification
    assert_parity("loss", loss.total, reference)
    reference.backward()
    loss.total.backward()
    assert_gradient_parity(model, theirs, names_of_two(model))


@pytest.mark.quick
def test_tubelets_are_a_convolution_in_time_and_space():
    model = tiny()
    c = model.config
    videos = torch.randn(2, c.channels, c.frames, *c.image_size)
    kernel = model.embed.proj.weight.view(c.dim, c.channels, *c.patch_size)
    expected = F.conv3d(videos, kernel, model.embed.proj.bias, stride=c.patch_size)
    tubelets = model._tubelets(ClipBatch.from_dense(videos).clips)
    assert tubelets.lengths().tolist() == [c.time] * 2
    rows = model.embed(tubelets.data)  # [2 * T * P, C]
    assert_parity("rows", rows, expected.permute(0, 2, 3, 4, 1).flatten(0, 3))


@pytest.mark.quick
def test_bytes_are_centred_at_zero():
    """uint8 frames are pixels from -1 to 1."""
    model = tiny()
    pixels = torch.randint(256, (6, 3, *model.config.image_size), dtype=torch.uint8)
    floating = PackedBatch.from_lengths(pixels.float() / 127.5 - 1, [4, 2])
    expected = model(floating)
    assert_parity("scores", model(PackedBatch.from_lengths(pixels, [4, 2])), expected)


# From images to clips.


@pytest.mark.quick
@pytest.mark.parametrize("inflation", ["central", "average"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_still_clip_is_its_image(inflation, depth):
    """Loaded from an image model, class rows of equal frames are the class row of that image."""
    transformers = pytest.importorskip("transformers")
    model = tiny(patch_size=(depth, 8, 8), frames=4 * depth, activation="gelu")
    c = model.config
    vit = transformers.ViTModel(
        transformers.ViTConfig(
            image_size=c.image_size,
            patch_size=8,
            hidden_size=c.dim,
            num_hidden_layers=c.spatial_depth,
            num_attention_heads=c.num_heads,
            intermediate_size=c.ffn_dim,
            layer_norm_eps=c.norm_eps,
        )
    ).eval()
    with torch.no_grad():
        for p in vit.parameters():
            p.add_(0.1 * torch.randn_like(p))
    temporal = copy.deepcopy(model.temporal.state_dict())
    model.load_image_model(vit.state_dict(), inflation=inflation)
    image = torch.randn(1, 3, *c.image_size)
    still = PackedBatch.from_lengths(image.expand(2 * depth, -1, -1, -1), [2 * depth])
    patches = vit.embeddings.patch_embeddings(image)[0].detach()  # [P, C]
    rows = model.embed(model._tubelets(still).data).detach().view(2, c.num_patches, c.dim)
    torch.testing.assert_close(rows, patches.expand_as(rows), atol=1e-6, rtol=1e-6)
    expected = vit(image).last_hidden_state[:, 0].expand(2, -1)
    assert_parity("class rows", model.features(still).data, expected)
    for name, tensor in model.temporal.state_dict().items():
        assert torch.equal(tensor, temporal[name]), name


@pytest.mark.quick
def test_inflated_kernels():
    kernel = torch.randn(4, 3, 2, 2)
    central, average = (inflate(kernel, 3, how) for how in ("central", "average"))
    assert torch.equal(central[:, :, 1], kernel) and not central[:, :, [0, 2]].any()
    assert torch.equal(inflate(kernel, 2, "central")[:, :, 1], kernel), "the second of two"
    assert torch.equal(average[:, :, 0], average[:, :, 2])
    torch.testing.assert_close(average.sum(2), kernel)
    with pytest.raises(ValueError, match="inflation 'centre' is unknown; did you mean 'central'"):
        inflate(kernel, 2, "centre")


# Clips of different lengths.


@pytest.mark.quick
def test_clips_do_not_see_each_other():
    """Other pixels around a clip leave its scores, and its gradient, bit-equal."""
    model = tiny().eval()
    results = []
    for seed in (1, 2):
        clips = batch_of(model, seed=seed).clips
        frames = clips.data.clone()
        frames[10:26] = torch.randn(16, *frames.shape[1:], generator=torch.Generator())
        frames.requires_grad_()
        scores = model(clips.with_data(frames))
        scores[2].square().sum().backward()
        assert frames.grad[10:26].any() and not frames.grad[:10].any()
        assert not frames.grad[26:].any()
        results.append((scores[2].detach(), frames.grad[10:26]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.quick
def test_a_batch_is_its_clips_one_by_one():
    model = tiny().eval()
    clips = batch_of(model).clips
    alone = [model(PackedBatch.from_list([clip])) for clip in clips.split() if len(clip)]
    assert_parity("scores", model(clips)[[0, 2, 3]], torch.cat(alone))


@pytest.mark.quick
def test_an_empty_clip_counts_for_nothing():
    model = tiny()
    batch = batch_of(model)
    kept = PackedBatch.from_list([clip for clip in batch.clips.split() if len(clip)])
    without = ClipBatch(kept, batch.labels[[0, 2, 3]])
    torch.testing.assert_close(model.loss(batch).total, model.loss(without).total)
    assert model.loss(batch_of(model, (0, 0))).total == 0


@pytest.mark.quick
def test_refuses_what_does_not_fit():
    model = tiny()
    size = (3, *model.config.image_size)
    with pytest.raises(ValueError, match=r"clip 1 has 3 frames, expected a multiple of 2"):
        model(PackedBatch.from_lengths(torch.zeros(5, *size), [2, 3]))
    with pytest.raises(ValueError, match=r"up to 9 time indices, the position table has 8"):
        model(PackedBatch.from_lengths(torch.zeros(18, *size), [18]))
    with pytest.raises(ValueError, match=r"clips has frames of \(8, 8\), expected \(16, 24\)"):
        model(PackedBatch.from_lengths(torch.zeros(2, 3, 8, 8), [2]))
    with pytest.raises(ValueError, match=r"needs batch.labels"):
        model.loss(ClipBatch(batch_of(model).clips))
    with pytest.raises(ValueError, match=r"needs batch.clips or batch.features"):
        model.loss(ClipBatch(None, torch.zeros(1, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"cache needs freeze_spatial=True"):
        model.cache(batch_of(model))
    with pytest.raises(ValueError, match=r"expected \[B, C, T, H, W\]"):
        ClipBatch.from_dense(torch.zeros(2, 3, 4, 4))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter": "mpl"}, "adapter 'mpl' is unknown; did you mean 'mlp'"),
        ({"frames": 15}, r"\(15, 16, 24\), expected multiples of \(2, 8, 8\)"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"spatial_chunk": 0}, "spatial_chunk must be >= 1 or None, got 0"),
        ({"temporal_depth": 0}, "temporal_depth must be >= 1, got 0"),
    ],
    ids=str,
)
def test_refuses_a_config_that_is_none(fields, message):
    with pytest.raises(ValueError, match=message):
        encfast.create("vivit/tiny", device="meta", **fields)


@pytest.mark.quick
def test_label_smoothing_is_that_of_torch():
    model = tiny(label_smoothing=0.1)
    batch = batch_of(model, (5, 8, 1))
    expected = F.cross_entropy(model(batch.clips), batch.labels, label_smoothing=0.1)
    assert_parity("loss", model.loss(batch).total, expected)


# Stage 2.


@pytest.mark.quick
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_fresh_adapter_changes_no_score(adapter):
    first = tiny()
    second = first.second_stage(adapter=adapter)
    clips = batch_of(first).clips
    torch.testing.assert_close(second(clips), first(clips), atol=1e-6, rtol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_only_what_is_not_frozen_learns(adapter):
    """Three steps: frozen parameters keep their bits, every other one moves."""
    model = tiny().second_stage(adapter=adapter).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    frozen = {name for name in before if name.startswith(("embed.", "spatial."))}
    for step in range(3):
        optimizer.zero_grad()
        model.loss(batch_of(model, seed=step)).total.backward()
        optimizer.step()
    for name, p in model.named_parameters():
        if name in frozen:
            assert torch.equal(p, before[name]), f"{name} has moved"
            assert p.grad is None and p not in optimizer.state and not p.requires_grad
        else:
            assert not torch.equal(p, before[name]), f"{name} has not moved"
    assert len(frozen) == 2 + 4 + 12 * model.config.spatial_depth


@pytest.mark.quick
def test_the_frozen_part_stays_in_evaluation():
    """Its drop path never drops, and what it returns has no graph."""
    model = tiny(drop_path=0.5).second_stage().train()
    assert not any(m.training for m in (*model.embed.modules(), *model.spatial.modules()))
    assert all(m.training for m in (*model.temporal.modules(), *model.adapter.modules()))
    clips = batch_of(model).clips
    features = model.features(clips)
    assert not features.data.requires_grad
    assert torch.equal(features.data, model.features(clips).data)
    trained = tiny(drop_path=0.5).train()
    assert not torch.equal(trained.features(clips).data, trained.features(clips).data)
    assert not any(m.training for m in model.eval().modules())


@pytest.mark.quick
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_cached_features_train_as_frames_do(adapter):
    model = tiny(freeze_spatial=True, adapter=adapter)
    batch = batch_of(model)
    cached = model.cache(batch)
    assert cached.clips is None and cached.features.lengths().tolist() == [5, 0, 8, 1]
    losses = [model.loss(b).total for b in (batch, cached)]
    assert torch.equal(*losses)
    learned = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(loss, learned) for loss in losses), strict=True):
        assert torch.equal(a, b)


@pytest.mark.quick
@pytest.mark.parametrize("adapter", ["mlp", "attn"])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_change_nothing(adapter, chunk):
    whole = tiny().second_stage(adapter=adapter)
    chunked = whole.second_stage(adapter=adapter, spatial_chunk=chunk)
    sizes = []
    chunked.embed.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    clips = batch_of(whole).clips
    assert_parity("features", chunked.features(clips).data, whole.features(clips).data, 1e-6)
    assert max(sizes) == min(chunk, 14) and sum(sizes) == 14
    empty = clips.data[:0]
    assert chunked(PackedBatch.from_lengths(empty, [0])).shape == (1, 6)


@pytest.mark.quick
def test_the_attention_adapter_reads_patches():
    """Its branch is the same whatever the class row holds, and differs with the patches."""
    model = tiny(adapter="attn", freeze_spatial=True)
    c = model.config
    x = torch.randn(3, 1 + c.num_patches, c.dim)
    other_class, other_patches = x.clone(), x.clone()
    other_class[:, 0] += 1
    other_patches[:, 1:] += torch.randn_like(x[:, 1:])
    branch, same, different = (
        model.adapter(rows) - rows[:, 0] for rows in (x, other_class, other_patches)
    )
    torch.testing.assert_close(same, branch, atol=1e-5, rtol=1e-5)
    assert (different - branch).abs().max() > 1e-2
    attn = model.adapter.attn
    q = attn.q(model.adapter.query).view(c.num_heads, 1, -1)
    k, v = (f(x[:, 1:]).unflatten(-1, (c.num_heads, -1)).transpose(1, 2) for f in (attn.k, attn.v))
    pooled = F.scaled_dot_product_attention(q.expand(3, -1, -1, -1), k, v).flatten(1)
    assert_parity("branch", branch, attn.out(pooled))


@pytest.mark.quick
def test_more_frames_stretch_the_positions():
    first = tiny(frames=8)
    second = first.second_stage(frames=32)
    tables = [m.temporal.positions.table.detach() for m in (first, second)]
    assert tables[0].shape == (5, 48) and tables[1].shape == (17, 48)
    assert torch.equal(tables[1][0], tables[0][0]), "the class token's"
    expected = F.interpolate(tables[0][1:].t()[None], size=16, mode="linear")[0].t()
    assert torch.equal(tables[1][1:], expected)
    batch = batch_of(second, (16, 4))
    loss = second.loss(batch).total
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in second.parameters() if p.requires_grad)


@pytest.mark.quick
def test_where_the_temporal_transformer_comes_from():
    first = tiny()
    kept, image, fresh = (
        first.second_stage(temporal_init=how) for how in ("stage1", "image", "random")
    )
    for model in (kept, image, fresh):
        for part in ("embed", "spatial"):
            state = getattr(model, part).state_dict()
            for name, tensor in getattr(first, part).state_dict().items():
                assert torch.equal(state[name], tensor), name
                assert state[name].data_ptr() != tensor.data_ptr(), "the stages share memory"
    for name, tensor in first.temporal.state_dict().items():
        assert torch.equal(kept.temporal.state_dict()[name], tensor)
        from_image = torch.equal(
            image.temporal.state_dict()[name], first.spatial.state_dict()[name]
        )
        assert from_image == (name != "positions.table"), name
        if tensor.std() > 0.01 and "norm" not in name:
            assert not torch.equal(fresh.temporal.state_dict()[name], tensor), name
    assert torch.equal(kept.head.weight, first.head.weight)
    assert not image.head.weight.any() and not fresh.head.weight.any()
    other = first.second_stage(num_labels=9)
    assert other.head.weight.shape == (9, 48) and not other.head.weight.any()
    with pytest.raises(ValueError, match="temporal_init 'stage2' is unknown; did you mean"):
        first.second_stage(temporal_init="stage2")
    with pytest.raises(ValueError, match="needs 3 spatial blocks, there are 2"):
        first.second_stage(temporal_init="image", temporal_depth=3)
    with pytest.raises(TypeError, match="no field 'framse'; did you mean 'frames'"):
        first.second_stage(framse=8)


def test_a_frozen_step_compiles_whole():
    """With the adapter that has most to trace; test_models.py compiles stage 1."""
    shallow = {"spatial_depth": 1, "temporal_depth": 1}
    model = tiny(frames=256, freeze_spatial=True, adapter="attn", **shallow).train()
    batches = [batch_of(model, shape, seed) for seed, shape in enumerate(SIX_SHAPES[:3])]
    assert_compiles(model, batches)


# Sizes.


@pytest.mark.quick
@pytest.mark.parametrize(
    ("variant", "spatial", "temporal", "total"),
    [
        ("base", 85_054_464, 28_351_488, 115_062_928),
        ("large", 302_309_376, 302_309_376, 606_827_920),
    ],
)
def test_published_sizes(variant, spatial, temporal, total):
    """85.1M + 28.4M and 302M + 302M in the blocks; the rest is tubelets, positions and head."""
    model = encfast.create(f"vivit/{variant}", device="meta")
    counts = [sum(p.numel() for p in m.stack.parameters()) for m in (model.spatial, model.temporal)]
    assert counts == [spatial, temporal]
    assert model.num_parameters() == total
    c = model.config
    assert (c.num_patches, c.time) == (196, 16)
    own = 3 * 2 * 16 * 16 * c.dim + c.dim  # tubelets
    own += (197 + 17 + 2 + 2 * 2) * c.dim  # positions, class tokens, final norms
    assert total == spatial + temporal + own + (c.dim + 1) * 400
