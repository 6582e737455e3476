"""SkeletonMAE: the mechanisms of its paper, and the recogniser beside one clip at a time."""

import copy

import pytest
import torch
import torch.nn.functional as F

import encfast
from encfast import PackedBatch
from encfast.layers import Graph
from encfast.models.skeletonmae import (
    COCO_EDGES,
    COCO_PARTS,
    SkeletonBatch,
    SkeletonMae,
    jitter,
    mask_joints,
    mask_parts,
    normalise,
    stick_figures,
)

from .common import SIX_SHAPES, assert_compiles, assert_parity

pytestmark = pytest.mark.quick


def tiny(task: str = "pretraining", **overrides) -> SkeletonMae:
    return encfast.create("skeletonmae/tiny", task=task, **overrides)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def poses(frames: int, *persons: int) -> torch.Tensor:
    """[frames, *persons, 17, 2]"""
    return torch.randn(frames, *persons, 17, 2)


def settled(model: SkeletonMae) -> SkeletonMae:
    """In evaluation mode, its batch norms with averages of their own."""
    with torch.no_grad():
        for name, t in [*model.named_buffers(), *model.named_parameters()]:
            if "running_var" in name:
                t.uniform_(0.5, 2)
            elif "matrix" not in name:
                t.add_(0.1 * torch.randn_like(t))
    return model.eval()


# The skeleton and its masks.


def test_the_skeleton_is_a_tree_of_six_parts():
    assert len(COCO_EDGES) == 16 and [len(part) for part in COCO_PARTS] == [5, 4, 2, 2, 2, 2]
    assert sorted(j for part in COCO_PARTS for j in part) == list(range(17))
    step = Graph(17, COCO_EDGES).adjacency() + torch.eye(17)
    assert torch.equal(step, step.T)
    assert (torch.linalg.matrix_power(step, 16) > 0).all(), "not connected"


@pytest.mark.parametrize("count", [1, 2, 6])
def test_masks_are_unions_of_whole_parts(count):
    mask = mask_parts(200, count=count, generator=seeded())
    hidden = torch.stack([mask[:, part].float().mean(1) for part in map(list, COCO_PARTS)], 1)
    assert ((hidden == 0) | (hidden == 1)).all(), "a part is hidden by halves"
    assert (hidden.sum(1) == count).all()
    if count < 6:
        share = hidden.mean(0)
        assert ((share - count / 6).abs() < 0.12).all(), f"parts are hidden unevenly: {share}"
    assert torch.equal(mask, mask_parts(200, count=count, generator=seeded()))
    only = mask_parts(9, count=2, choice=(3, 5))
    assert only.nonzero()[:, 1].view(9, 4).tolist() == [[8, 10, 14, 16]] * 9


def test_random_masks_hide_a_share_of_the_joints():
    mask = mask_joints(200, 0.3, generator=seeded())
    assert (mask.sum(1) == 5).all() and (mask.sum(0) > 20).all()


def test_masks_follow_the_device():
    assert mask_parts(4, generator=seeded(), device="meta").is_meta
    assert mask_joints(4, 0.5, device="meta").is_meta
    assert mask_parts(0).shape == mask_joints(0, 0.5).shape == (0, 17)


def test_masked_rows_are_the_token_and_the_rest_is_untouched():
    model, seen = settled(tiny()), []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = model.example_batch(seeded(), lengths=[5, 0, 9])
    x = model.embedded(batch.tokens)
    rebuilt = model.reconstruct(x, batch.rows)
    hidden = torch.zeros(14 * 17, dtype=torch.bool)
    hidden[batch.rows] = True
    shown = seen[0].flatten(0, 1)
    assert shown.shape == (14 * 17, 32), "every joint stays in the graph"
    assert torch.equal(shown[hidden], model.mask_token.expand(int(hidden.sum()), -1))
    assert torch.equal(shown[~hidden], x.flatten(0, 1)[~hidden])
    assert rebuilt.shape == (int(hidden.sum()), 32)
    # What stood at a masked joint is never read.
    other = torch.where(hidden.view(14, 17, 1), torch.nan, x)
    assert torch.equal(model.reconstruct(other, batch.rows), rebuilt)


def test_the_loss_sees_masked_targets_alone():
    model = tiny()
    batch = model.example_batch(seeded(), lengths=[6])
    x = model.embedded(batch.tokens).detach()
    rebuilt = model.reconstruct(x, batch.rows).detach()
    targets = x.flatten(0, 1).requires_grad_()
    loss = encfast.losses.scaled_cosine_error(rebuilt, targets[batch.rows])
    torch.testing.assert_close(loss, model.loss(batch).total)
    loss.backward()
    moved = targets.grad.any(1).nonzero().flatten()
    assert torch.equal(moved, batch.rows)


def test_targets_do_not_train_the_embedding():
    """With every joint hidden nothing of a pose enters the model but the targets."""
    model = tiny(num_masked_parts=6)
    model.loss(model.example_batch(seeded())).total.backward()
    assert not model.embed.weight.grad.any()
    assert model.mask_token.grad.any()


# The graph.


def test_relabelled_joints_give_relabelled_outputs():
    model = settled(tiny())
    order = torch.randperm(17)  # new joint n is old joint order[n]
    place = order.argsort().tolist()
    edges = tuple((place[i], place[j]) for i, j in COCO_EDGES)
    parts = tuple(tuple(place[j] for j in part) for part in COCO_PARTS)
    other = settled(tiny(edges=edges, parts=parts))
    other.load_state_dict(model.state_dict())
    x = torch.randn(6, 17, 32)
    assert_parity("encoder", other.encoder(x[:, order]), model.encoder(x)[:, order])
    assert_parity("decoder", other.decoder(x[:, order]), model.decoder(x)[:, order])


def test_an_edge_less_changes_the_result():
    model = settled(tiny())
    cut = settled(tiny(edges=COCO_EDGES[1:]))  # without the left shin
    cut.load_state_dict(model.state_dict())
    x = torch.randn(6, 17, 32)
    change = (cut.encoder(x) - model.encoder(x)).abs().amax((0, 2))
    # Ankle and knee in the first layer, their neighbours in the second.
    assert (change > 1e-3).nonzero().flatten().tolist() == [11, 13, 15]


@pytest.mark.parametrize("convolution", ["gin", "gcn", "gat"])
@pytest.mark.parametrize("task", ["pretraining", "classification"])
def test_all_convolutions_train(convolution, task):
    model = tiny(task, convolution=convolution)
    model.loss(model.example_batch(seeded())).total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_norms_inside_graph_layers_are_a_choice():
    with_norm, without = tiny(), tiny(norm="none")
    assert any("running" in name for name in with_norm.state_dict())
    assert not any("running" in name for name in without.state_dict())
    without.loss(without.example_batch(seeded())).total.backward()
    assert all(p.grad.isfinite().all() for p in without.parameters())


def test_published_depths():
    model = encfast.create("skeletonmae/base", device="meta")
    assert (len(model.encoder.layers), len(model.decoder.layers)) == (3, 1)
    assert model.embed.weight.shape == (64, 2) and model.mask_token.shape == (64,)
    hidden = model.mask(PackedBatch.from_lengths(poses(3), [3])).rows % 17
    assert hidden.view(3, 4).tolist() == [[8, 10, 14, 16]] * 3, "right arm and right leg"
    recogniser = encfast.create("skeletonmae/finegym", device="meta")
    assert len(recogniser.layers) == 3 and recogniser.temporal.weight.shape == (64, 64)
    assert [len(layer.encoders) for layer in recogniser.layers] == [2, 2, 2]
    assert recogniser.head[-1].weight.shape == (99, 64)


# The recogniser.


def test_every_joint_meets_the_sum_of_its_body():
    layer = settled(tiny("classification")).layers[0]
    x = torch.randn(4, 2, 17, 32)
    sums = torch.stack([encoder(x[:, p]).sum(1) for p, encoder in enumerate(layer.encoders)], 1)
    y = layer.structure(x)
    assert_parity("SM structure", y, x + sums[:, :, None].expand(x.shape))
    moved = x.clone()
    moved[:, 0, 9] += 1
    change = (layer.structure(moved) - y).abs().amax(-1)
    assert (change[:, 0] > 1e-4).all(), "a joint did not hear of the wrist"
    assert not change[:, 1].any(), "the other person did"


def test_each_person_has_an_encoder():
    layer = tiny("classification").layers[0]
    first, second = (list(encoder.parameters()) for encoder in layer.encoders)
    assert len(first) == len(second) and not {id(p) for p in first} & {id(p) for p in second}
    x = torch.randn(4, 17, 32)
    assert not torch.allclose(layer.encoders[0](x), layer.encoders[1](x))


def alone(model: SkeletonMae, clip: torch.Tensor) -> torch.Tensor:
    """Scores of one clip [T, P, V, 2]: padded convolutions over nothing but its frames."""
    x = clip @ model.embed.weight.T + model.temporal.weight[: len(clip), None, None]
    for layer in model.layers:
        y = F.relu(layer.mix(layer.structure(x))).flatten(1, 2)
        time = layer.time
        inner = time.up_norm(time.up(y)).permute(1, 2, 0).split(8, 1)  # 4 of [J, 8, T]
        wide = [F.relu(part) for part in inner[:3]]
        scales = [
            F.conv1d(wide[0], time.convs[0].weight, time.convs[0].bias, padding=2),
            F.conv1d(wide[1], time.convs[1].weight, time.convs[1].bias, padding=4, dilation=2),
            F.max_pool1d(wide[2], 3, 1, 1),
        ]
        pooled = time.norm(torch.cat(scales, 1).permute(2, 0, 1))
        y = torch.cat((pooled, inner[3].permute(2, 0, 1)), -1).view(x.shape)
        x = F.relu(y + layer.residual(x))
    return model.head(x.mean((0, 1, 2)))


def test_ragged_clips_are_what_each_is_alone():
    model = settled(tiny("classification"))
    clips = [poses(frames, 2) for frames in (1, 30, 2, 64)]
    tokens = PackedBatch.from_list([*clips[:2], clips[0][:0], *clips[2:]])
    scores = model(tokens)
    expected = torch.stack([alone(model, clip) for clip in clips])
    assert_parity("scores", scores[[0, 1, 3, 4]], expected)
    changed = model(PackedBatch.from_list([poses(1, 2), clips[1], poses(0, 2), *clips[2:]]))
    assert torch.equal(changed[1:], scores[1:]), "a clip sees its neighbour"


def test_labels_are_smoothed():
    model = tiny("classification")
    batch = model.example_batch(seeded(), lengths=[5, 0, 9])
    scores = model(batch.tokens)[[0, 2]]
    target = 0.9 * F.one_hot(batch.labels[[0, 2]], 6) + 0.1 / 6
    expected = -(target * scores.log_softmax(-1)).sum(-1).mean()
    loss = model.loss(batch)
    assert loss.total is loss.classification
    torch.testing.assert_close(loss.total, expected)


def test_fine_tuning_starts_from_the_encoder():
    pretrained, model = settled(tiny()), tiny("classification")
    model.load_encoder(pretrained.state_dict())
    assert torch.equal(model.embed.weight, pretrained.embed.weight)
    for layer in model.layers:
        for encoder in layer.encoders:
            for name, t in pretrained.encoder.state_dict().items():
                assert torch.equal(encoder.state_dict()[name], t), name
    model.loss(model.example_batch(seeded())).total.backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if n.endswith("mlp.3.weight"))
    with pytest.raises(ValueError, match="for task 'classification', not 'pretraining'"):
        pretrained.load_encoder(pretrained.state_dict())
    with pytest.raises(ValueError, match=r"pretrained holds no encoder\.\*, but"):
        model.load_encoder(tiny("classification").state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_encoder(tiny(encoder_depth=1).state_dict())


# Trainers.


def test_checkpointing_keeps_outputs_gradients_and_averages():
    for task in ("pretraining", "classification"):
        model = tiny(task).train()
        twin = copy.deepcopy(model)
        twin.gradient_checkpointing_enable()
        batch = model.example_batch(seeded())
        for each in (model, twin):
            each.loss(batch).total.backward()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name
        for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
            assert torch.equal(a, b), name


def test_the_recogniser_compiles_once_for_all_lengths():
    """`max_pool1d` had a graph compiled for every length."""
    model = tiny("classification", encoder_depth=1, num_persons=1).train()
    model.gradient_checkpointing_enable()
    batches = [model.example_batch(seeded(), lengths=lengths) for lengths in SIX_SHAPES[:3]]
    assert_compiles(model, batches, max_graphs=1)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [0, 2, 0]], ids=str)
def test_the_recogniser_tolerates_empty_clips(lengths):
    model = tiny("classification")
    batch = model.example_batch(seeded(), lengths=lengths)
    assert model(batch.tokens).shape == (len(lengths), 6)
    loss = model.loss(batch).total
    loss.backward()
    assert loss.isfinite() and (loss == 0) == (sum(lengths) == 0)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(b.isfinite().all() for b in model.buffers())


@pytest.mark.parametrize("task", ["pretraining", "classification"])
def test_autocast_stays_close(task):
    model = tiny(task)
    batch = model.example_batch(seeded())
    exact = model.loss(batch).total
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(batch).total
    loss.backward()
    assert_parity("loss", loss, exact, tolerance=2e-2)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_batches_move():
    batch = tiny("classification").example_batch(seeded()).to(torch.float64)
    assert batch.tokens.data.dtype == torch.float64 and batch.labels.dtype == torch.int64
    assert tiny().example_batch(seeded()).to("cpu").rows.dtype == torch.int64


# Poses.


def test_normalised_poses_forget_place_and_size():
    figure = stick_figures(torch.tensor([2, 4]), [8, 5], seeded())
    assert figure.shape == (13, 17, 2) and figure.min() > 50
    pose = normalise(figure)
    torch.testing.assert_close(pose[:, [11, 12]].mean(1), torch.zeros(13, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(pose.norm(dim=-1).mean(-1), torch.ones(13))
    assert_parity("moved", normalise(3 * figure + 100), pose)
    assert not normalise(torch.zeros(2, 17, 2)).any()
    assert stick_figures(torch.zeros(0, dtype=torch.int64), []).shape == (0, 17, 2)


def test_limbs_keep_their_length_while_they_swing():
    figure = stick_figures(torch.arange(6), [20] * 6, seeded())
    for i, j in [(5, 7), (7, 9), (12, 14), (14, 16)]:
        bones = (figure[:, i] - figure[:, j]).norm(dim=-1).view(6, 20)
        torch.testing.assert_close(bones, bones[:, :1].expand(6, 20), rtol=1e-3, atol=0)
    assert figure.view(6, 20, 34).std(1).amax(1).min() > 1, "a figure stands still"


def test_jitter_is_noise_of_the_asked_size():
    noise = jitter(torch.zeros(500, 17, 2), 0.05, seeded())
    assert noise.std() == pytest.approx(0.05, rel=0.05)
    assert torch.equal(jitter(noise, 0), noise)


# Errors.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"task": "pretrain"}, "task 'pretrain' is unknown; did you mean 'pretraining'"),
        ({"convolution": "gjn"}, "convolution 'gjn' is unknown; did you mean 'gin'"),
        ({"masking": "joint"}, "masking 'joint' is unknown; did you mean 'joints'"),
        ({"norm": "layer"}, "norm 'layer' is unknown"),
        ({"num_joints": 16}, r"edges holds \(16, 14\), expected two nodes in \[0, 16\)"),
        ({"parts": ()}, "parts is empty"),
        ({"parts": ((0,), ())}, r"parts\[1\] is empty"),
        ({"parts": ((0, 17),)}, r"parts\[0\] holds joint 17, expected \[0, 17\)"),
        ({"parts": ((0, 1), (1,))}, r"parts\[1\] holds joint 1 a second time"),
        ({"maskable_parts": ()}, "maskable_parts is empty: the mask would hide nothing"),
        ({"maskable_parts": (6, 0)}, r"maskable_parts holds 6, expected a part in \[0, 6\)"),
        ({"maskable_parts": (1, 1)}, "maskable_parts holds a part twice"),
        ({"num_masked_parts": 7}, r"num_masked_parts must be in \[1, 6\]"),
        ({"num_masked_parts": 0}, r"num_masked_parts must be in \[1, 6\]"),
        ({"mask_ratio": 0.0}, r"mask_ratio must be in \(0, 1\], got 0.0"),
        ({"mask_ratio": 1.5}, r"mask_ratio must be in \(0, 1\], got 1.5"),
        ({"mask_ratio": 0.02}, "mask_ratio=0.02 hides none of 17 joints"),
        ({"beta": 0.5}, "beta must be >= 1, got 0.5"),
        ({"label_smoothing": 1.1}, r"label_smoothing must be in \[0, 1\], got 1.1"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"dilations": ()}, "dilations must be >= 1"),
        ({"depth": 0}, "depth must be >= 1, got 0"),
        ({"task": "classification", "hidden_dim": 16}, "hidden_dim=16 must be dim=32 to classify"),
        ({"task": "classification", "dilations": (1,)}, "dim=32 must be a multiple of the 3"),
    ],
    ids=str,
)
def test_a_bad_config_names_its_field(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny(**overrides)


def test_bad_batches_name_what_is_wrong():
    model, recogniser = tiny(), tiny("classification")
    tokens = PackedBatch.from_lengths(poses(3), [3])
    two = PackedBatch.from_lengths(poses(3, 2), [3])
    with pytest.raises(ValueError, match=r"task 'pretraining' needs batch.rows, which is None"):
        model.loss(SkeletonBatch(tokens))
    with pytest.raises(ValueError, match=r"task 'classification' needs batch.labels"):
        recogniser.loss(SkeletonBatch(two))
    nothing = torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="the mask hides nothing in 3 frames"):
        model.loss(SkeletonBatch(tokens, nothing))
    with pytest.raises(ValueError, match="the mask hides nothing in 3 frames"):
        SkeletonBatch.from_mask(tokens, torch.zeros(3, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask has shape \(3, 16\), expected \(3, 17\)"):
        SkeletonBatch.from_mask(tokens, torch.ones(3, 16, dtype=torch.bool))
    for wrong in (two, PackedBatch.from_lengths(torch.randn(3, 16, 2), [3])):
        with pytest.raises(ValueError, match="the adjacency has 17 joints of 2 coordinates"):
            model(wrong)
    with pytest.raises(ValueError, match=r"expected \(2, 17, 2\) for task 'classification'"):
        recogniser(tokens)
    with pytest.raises(ValueError, match="a clip has 129 frames, the position table 128"):
        recogniser(PackedBatch.from_lengths(poses(129, 2), [129]))
    with pytest.raises(ValueError, match="std must be >= 0, got -1"):
        jitter(poses(1), -1)
    with pytest.raises(ValueError, match="the stick figures have 17 joints of 2 coordinates"):
        tiny(coords=3).example_batch()
