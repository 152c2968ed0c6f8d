"""A convolutional net over log-mel spectrograms of any length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AudioConv(nn.Module):
    """A convolution of stride 2 over mel bands and time, stages of two 3×3 ones, each halved; then a mean over time.

    Each clip is first brought to mean 0 and deviation 1 over its own frames, so that its loudness does not matter.
    With ``length``, frames behind a clip's own are set to 0 before every convolution and left out of every mean: in
    evaluation a clip gives the same output alone and beside longer ones.

    Shapes:  audio float (B, M, T), length int64 (B,) of valid frames, at least 1 → (B, K)
    """

    def __init__(self, num_mels: int, num_outputs: int, widths: Sequence[int] = (32, 64, 128), dropout: float = 0.2):
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 5, stride=2, padding=2, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.stages = nn.ModuleList(
            AudioStage(c_in, c_out) for c_in, c_out in zip([widths[0], *widths], widths, strict=False)
        )
        bands = -(-num_mels // 2 ** (1 + len(widths)))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1] * bands, num_outputs)

    def forward(self, audio: Tensor, length: Tensor | None = None) -> Tensor:
        if length is None:
            length = audio.new_full((len(audio),), audio.shape[2], dtype=torch.int64)
        x = F.relu(self.norm(self.stem(normalise_clips(audio, length)[:, None])))
        length = (length + 1) // 2
        for stage in self.stages:
            x = stage(x, length)
            length = (length + 1) // 2
        means = x.sum(3) / length[:, None, None]
        output: Tensor = self.head(self.dropout(means.flatten(1)))
        return output


class AudioStage(nn.Module):
    """Two convolutions with batch norm, then the larger of each 2×2 cells.

    Shapes:  x (B, C_in, M, T), length (B,) → (B, C_out, M / 2, T / 2), rounded up, 0 behind each clip's frames
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        valid = valid_frames(length, x.shape[3]).to(x.dtype)[:, None, None]
        x = F.relu(self.bn1(self.conv1(x * valid))) * valid
        x = F.relu(self.bn2(self.conv2(x))) * valid
        # rounded up, a last odd frame is kept whether or not padding follows it; beside it 0 is never the larger
        return F.max_pool2d(x, 2, ceil_mode=True)


def valid_frames(length: Tensor, num_frames: int) -> Tensor:
    """Which frames are a clip's own. Shapes: (B,) → bool (B, T)."""
    return torch.arange(num_frames, device=length.device) < length[:, None]


def normalise_clips(audio: Tensor, length: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over all bands and valid frames of each clip; 0 behind them. Shapes: (B, M, T)."""
    valid = valid_frames(length, audio.shape[2])[:, None]
    count = (length * audio.shape[1])[:, None, None]
    centred = torch.where(valid, audio - torch.where(valid, audio, 0).sum((1, 2), keepdim=True) / count, 0)
    deviation = (centred.square().sum((1, 2), keepdim=True) / count).sqrt()
    return centred / (deviation + 1e-5)  # silence has no deviation, and stays 0
