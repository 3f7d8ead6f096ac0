"""Distillation: a training that also follows the scores of models which are trained already (arXiv 1503.02531).

Teachers see the very clips that are trained on, changed and mixed alike, as Beyer et al. (CVPR 2022, arXiv 2106.05237)
advise: what a teacher says of another crop is not what the model should say of this one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lean3d import checkpoint
from lean3d.config import InputSpec
from lean3d.errors import ConfigError
from lean3d.evaluate import class_differences

TEMPERATURE = 2.0
"""By which the scores of both are divided, so that what a teacher holds for less likely counts too."""


class Teachers:
    """Trained models whose mean is followed.

    Args:
        paths: Their runs' folders or model files.
        spec: The clips that are trained on; teachers take the same.
        classes: The training's; teachers know the same, in any order.
        device: Where they compute.

    Raises:
        CheckpointError: A teacher can't be read.
        ConfigError: It takes other clips, or knows other classes.
    """

    def __init__(self, paths: Sequence[str], spec: InputSpec, classes: Sequence[str], device: torch.device):
        self.members = []
        for path in paths:
            found = checkpoint.load(path)
            if differences := class_differences(classes, found.classes):
                raise ConfigError(
                    f"--optim.teachers {path} must know the training's classes: it {differences}. Train it on the same "
                    "clips"
                )
            if found.model.input_spec != spec:
                raise ConfigError(
                    f"--optim.teachers {path} takes other clips than the model: {found.model.input_spec}, the model "
                    f"{spec}. Train one of them with the other's --model.num-frames, --model.sampling-rate, "
                    "--model.size, --model.region and --model.in-channels"
                )
            order = torch.tensor([found.classes.index(name) for name in classes], device=device)
            self.members.append((found.model.to(device).requires_grad_(False), order))

    @torch.no_grad()
    def probabilities(self, clips: Tensor) -> Tensor:
        """Of normalised clips `(N, C, T, H, W)` -> `(N, classes)`, the teachers' mean, softened."""
        each = [(model(clips)[:, order].float() / TEMPERATURE).softmax(1) for model, order in self.members]
        return torch.stack(each).mean(0)

    def loss(self, scores: Tensor, clips: Tensor) -> Tensor:
        """How far scores `(N, classes)` are from what the teachers say: Kullback and Leibler's divergence, a mean.

        Times the temperature's square, which gives its gradients the size of the cross entropy's.
        """
        ours = (scores.float() / TEMPERATURE).log_softmax(1)
        return TEMPERATURE**2 * F.kl_div(ours, self.probabilities(clips), reduction="batchmean")
