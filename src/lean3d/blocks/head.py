"""What turns features into scores."""

from __future__ import annotations

from torch import Tensor, nn

from lean3d.blocks.streaming import Chain, Recent, Stream


class Head(nn.Module):
    """Global average over time and plane, dropout, linear classifier: any clip length and size.

    Args:
        in_channels: channels of the features.
        num_classes: length of the result.
        dropout: probability, in training.
    """

    def __init__(self, in_channels: int, num_classes: int, *, dropout: float = 0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_channels, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, num_classes)`."""
        return self.linear(self.dropout(x.mean((2, 3, 4))))

    def stream(self, frames: int) -> Stream:
        """The head frame by frame: the scores of the last `frames` frames of features, those that there are."""
        mean = Recent(frames, "mean")
        return Chain(lambda x: x.mean((3, 4), keepdim=True), mean, lambda x: self.linear(x.flatten(1)))
