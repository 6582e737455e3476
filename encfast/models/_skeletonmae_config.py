"""SkeletonMaeConfig: graph, sizes and task of a SkeletonMAE or its recogniser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from encfast.config import nearest
from encfast.layers import Graph
from encfast.layers.graph import GraphNorm
from encfast.models._skeletonmae_masking import (
    COCO_EDGES,
    COCO_PARTS,
    NUM_JOINTS,
    RIGHT_ARM,
    RIGHT_LEG,
    check_choice,
    check_parts,
    check_ratio,
)

Task = Literal["pretraining", "classification"]
Convolution = Literal["gin", "gcn", "gat"]
Masking = Literal["parts", "joints"]


@dataclass(frozen=True)
class SkeletonMaeConfig:
    """SkeletonMAE as pre-trained for its best figures: right arm and right leg are masked."""

    num_joints: int = NUM_JOINTS  # V
    edges: tuple[tuple[int, int], ...] = COCO_EDGES
    parts: tuple[tuple[int, ...], ...] = COCO_PARTS  # joints of each body part
    coords: int = 2  # of a joint
    dim: int = 64  # D: channels of an embedded joint
    hidden_dim: int = 64  # Dh: channels of the encoder
    convolution: Convolution = "gin"
    norm: GraphNorm = "batch"  # inside GIN layers
    encoder_depth: int = 3  # L_D
    decoder_depth: int = 1

    task: Task = "pretraining"
    beta: float = 2.0  # exponent of the cosine error, >= 1
    reduction: Literal["mean", "rescaled"] = "mean"  # see losses.scaled_cosine_error
    masking: Masking = "parts"
    maskable_parts: tuple[int, ...] = (RIGHT_ARM, RIGHT_LEG)  # to draw from, in every frame
    num_masked_parts: int = 2  # to draw
    mask_ratio: float = 0.3  # share of the joints, if masking is "joints"

    num_labels: int = 99  # K
    num_persons: int = 2  # P
    depth: int = 3  # M: layers of the STRL stack
    num_frames: int = 64  # longest clip
    kernel_size: int = 5  # frames, odd
    dilations: tuple[int, ...] = (1, 2)  # of the temporal branches
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        for name, kinds in (("task", Task), ("convolution", Convolution), ("masking", Masking)):
            if getattr(self, name) not in get_args(kinds):
                value = getattr(self, name)
                raise ValueError(f"{name} {value!r} is unknown; {nearest(value, get_args(kinds))}")
        positive = ("coords", "dim", "hidden_dim", "encoder_depth", "decoder_depth")
        for name in (*positive, "num_labels", "num_persons", "depth", "num_frames", "kernel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        self.graph()
        check_parts(self.parts, self.num_joints)
        check_choice(self.maskable_parts, self.num_masked_parts, len(self.parts))
        check_ratio(self.mask_ratio, self.num_joints)
        if not self.beta >= 1:
            raise ValueError(f"beta must be >= 1, got {self.beta}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {self.label_smoothing}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
        if not self.dilations or min(self.dilations) < 1:
            raise ValueError(f"dilations must be >= 1, at least one of them, got {self.dilations}")
        if self.task == "classification":
            self._check_classifier()

    def _check_classifier(self) -> None:
        if self.hidden_dim != self.dim:
            raise ValueError(
                f"hidden_dim={self.hidden_dim} must be dim={self.dim} to classify: what the "
                "encoder finds is added to its input"
            )
        branches = len(self.dilations) + 2
        if self.dim % branches:
            raise ValueError(f"dim={self.dim} must be a multiple of the {branches} branches")

    def graph(self) -> Graph:
        """Joints and limbs."""
        return Graph(self.num_joints, self.edges)

    @property
    def reach(self) -> int:
        """Frames that a temporal branch looks to either side."""
        return max(1, max(self.dilations) * (self.kernel_size // 2))
