"""Padding behind a clip changes nothing about it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchkeep.model.audio import AudioConv, normalise_clips, valid_frames


def trained_like(num_mels: int = 20) -> AudioConv:
    """A model in evaluation whose norms move their inputs, as after training: padding would leak where it can."""
    torch.manual_seed(0)
    model = AudioConv(num_mels, 5, widths=(8, 12))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, 0.1, 1.0)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
    return model.eval()


def padded_with(clip: Tensor, num_frames: int, value: float) -> Tensor:
    return nn.functional.pad(clip, (0, num_frames), value=value)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 7, 8, 9, 33, 50])
@pytest.mark.parametrize("padding", [1, 2, 3, 30])
@pytest.mark.parametrize("value", [0.0, -13.8, 1e6, float("nan")])
def test_padding_does_not_change_the_output(num_frames: int, padding: int, value: float) -> None:
    model = trained_like()
    clip = torch.randn(1, 20, num_frames) * 3 - 8
    alone = model(clip)
    behind = model(padded_with(clip, padding, value), torch.tensor([num_frames]))
    torch.testing.assert_close(behind, alone, rtol=0, atol=1e-5)


def test_a_clip_gives_the_same_beside_longer_ones() -> None:
    model = trained_like()
    clips = [torch.randn(20, num_frames) - 5 for num_frames in (5, 18, 31, 64)]
    batch = torch.stack([padded_with(clip, 64 - clip.shape[1], 7.0) for clip in clips])
    together = model(batch, torch.tensor([clip.shape[1] for clip in clips]))
    for clip, output in zip(clips, together, strict=True):
        torch.testing.assert_close(model(clip[None])[0], output, rtol=0, atol=1e-5)


def test_without_a_length_every_frame_is_valid() -> None:
    model = trained_like()
    clips = torch.randn(3, 20, 40)
    assert torch.equal(model(clips), model(clips, torch.full((3,), 40)))


def test_loudness_does_not_matter() -> None:
    model = trained_like()
    clips = torch.randn(2, 20, 40)
    torch.testing.assert_close(model(clips), model(clips + 2.5), rtol=0, atol=1e-4)


def test_silence_is_finite_and_has_finite_gradients() -> None:
    model = AudioConv(20, 5, widths=(8,))
    model(torch.full((2, 20, 30), -13.8)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_clips_are_normalised_over_their_own_frames() -> None:
    clips = torch.randn(2, 20, 40) * 4 - 9
    normal = normalise_clips(clips, torch.tensor([40, 11]))
    own = normal[1, :, :11]
    assert abs(float(own.mean())) < 1e-5
    assert float(own.std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert not normal[1, :, 11:].any()


def test_valid_frames_are_the_first() -> None:
    assert valid_frames(torch.tensor([0, 2, 3]), 3).int().tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize("num_mels", [1, 13, 40, 64])
@pytest.mark.parametrize("widths", [(8,), (8, 16, 24)])
def test_any_number_of_bands_is_taken(num_mels: int, widths: tuple[int, ...]) -> None:
    assert AudioConv(num_mels, 3, widths)(torch.randn(2, num_mels, 21), torch.tensor([21, 4])).shape == (2, 3)
