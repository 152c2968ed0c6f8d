"""Models of texts from scratch: n-grams of tokens by convolution, and a small transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ModelError

_LOWEST = -1e4  # below any activation here, and still a number in fp16


class TextConv(nn.Module):
    """Convolutions over tokens, pooled: the largest and the mean answer of each filter in the text.

    A window of ``kernels`` tokens ends at each token, so that a padded text has the windows that it has alone.

    Shapes:  input_ids int64 (B, T), attention_mask (B, T), 0 where padded, none: every token counts → logits (B, K)
    Source:  Kim 2014, "Convolutional neural networks for sentence classification" (arXiv 1408.5882)
    """

    def __init__(
        self, num_tokens: int, num_outputs: int, width: int = 128, channels: int = 256,
        kernels: Sequence[int] = (1, 2, 3), dropout: float = 0.5, token_dropout: float = 0.1,
        embedding_std: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        # torch's own std of 1 drowns what the few occurrences of a rare word teach: 0.71 against 0.79 on SST-2's dev
        self.embedding = _embedding(num_tokens, width, embedding_std)
        self.token_dropout = nn.Dropout1d(token_dropout)
        self.kernels = tuple(kernels)
        self.convolutions = nn.ModuleList(nn.Conv1d(width, channels, size) for size in kernels)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * channels * len(kernels), num_outputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        keep_BT = _mask(input_ids, attention_mask)
        x_BTC = self.token_dropout(self.embedding(input_ids)) * keep_BT.unsqueeze(2)
        x_BCT = x_BTC.transpose(1, 2)
        windows = zip(self.convolutions, self.kernels, strict=True)
        answers = [F.relu(convolve(F.pad(x_BCT, (size - 1, 0)))) for convolve, size in windows]
        pooled = _pool(torch.cat(answers, 1), keep_BT.unsqueeze(1))
        logits: Tensor = self.head(self.dropout(pooled))
        return logits


class Transformer(nn.Module):
    """A small pre-norm transformer: over a whole text, or causal, with an answer for each token.

    Positions are rotated into queries and keys, so that a text may have any length. Where ``per_token``, token t sees
    tokens 0 … t; padding belongs at the end.

    Shapes:  input_ids int64 (B, T), attention_mask (B, T), 0 where padded, none: every token counts
             → logits (B, K), or (B, T, K) where ``per_token``
    Raises:  ModelError where the width does not part into heads of an even size
    Source:  Vaswani et al. 2017 (arXiv 1706.03762); Xiong et al. 2020 for the order of the norms (arXiv 2002.04745);
             Su et al. 2021 for the rotation (arXiv 2104.09864)
    """

    def __init__(
        self, num_tokens: int, num_outputs: int, width: int = 128, depth: int = 4, heads: int = 4,
        dropout: float = 0.1, per_token: bool = False, embedding_std: float = 0.02,
    ):  # fmt: skip
        super().__init__()
        if width % (2 * heads):
            got, expected = f"width {width}, heads {heads}", "a width that 2 × heads divides"
            raise ModelError("this width does not part into heads", where="Transformer", got=got, expected=expected)
        self.per_token = per_token
        self.head_width = width // heads
        self.embedding = _embedding(num_tokens, width, embedding_std)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, per_token) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width if per_token else 2 * width, num_outputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        keep_BT = _mask(input_ids, attention_mask)
        x_BTC = self.dropout(self.embedding(input_ids))
        rotation = _rotation(x_BTC, self.head_width)
        # a causal token never sees the padding behind it, and without a mask the fast causal kernel is taken
        seen = None if self.per_token or attention_mask is None else keep_BT[:, None, None, :]
        for block in self.blocks:
            x_BTC = block(x_BTC, rotation, seen)
        x_BTC = self.norm(x_BTC)
        pooled = x_BTC if self.per_token else _pool(x_BTC.transpose(1, 2), keep_BT.unsqueeze(1))
        logits: Tensor = self.head(pooled)
        return logits


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)): (B, T, C) → (B, T, C).

    ``rotation`` (2, T, D / 2): cosines and sines of each position; none where positions are in x. ``seen`` bool, to be
    spread over (B, heads, T, T): which tokens count; none: all.
    """

    def __init__(self, width: int, heads: int, dropout: float, causal: bool):
        super().__init__()
        self.heads, self.head_width, self.causal, self.attention_dropout = heads, width // heads, causal, dropout
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTC: Tensor, rotation: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        x_BTC = x_BTC + self.dropout(self._attend(self.attention_norm(x_BTC), rotation, seen))
        mixed: Tensor = x_BTC + self.dropout(self.feed(self.feed_norm(x_BTC)))
        return mixed

    def _attend(self, x_BTC: Tensor, rotation: Tensor | None, seen: Tensor | None) -> Tensor:
        parts = self.queries_keys_values(x_BTC).unflatten(2, (3, self.heads, self.head_width))
        q_BHTD, k_BHTD, v_BHTD = parts.permute(2, 0, 3, 1, 4)
        found_BHTD = F.scaled_dot_product_attention(
            _rotate(q_BHTD, rotation),
            _rotate(k_BHTD, rotation),
            v_BHTD,
            attn_mask=seen,
            dropout_p=self.attention_dropout if self.training else 0.0,
            is_causal=self.causal,
        )
        mixed: Tensor = self.mix(found_BHTD.transpose(1, 2).flatten(2))
        return mixed


def _rotation(x_BTC: Tensor, head_width: int) -> Tensor:
    """The cosines and sines of each position's angles, (2, T, D / 2)."""
    # fp32 whatever the precision: bf16 holds whole numbers only up to 256
    half = torch.arange(head_width // 2, device=x_BTC.device, dtype=torch.float32)
    positions = torch.arange(x_BTC.shape[1], device=x_BTC.device, dtype=torch.float32)
    angles = torch.outer(positions, 10_000.0 ** (-half / (head_width // 2)))
    return torch.stack([angles.cos(), angles.sin()]).to(x_BTC.dtype)


def _rotate(x_BHTD: Tensor, rotation: Tensor | None) -> Tensor:
    if rotation is None:
        return x_BHTD
    cos, sin = rotation
    left, right = x_BHTD.chunk(2, 3)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], 3).to(x_BHTD.dtype)


def _embedding(num_tokens: int, width: int, std: float) -> nn.Embedding:
    embedding = nn.Embedding(num_tokens, width)
    nn.init.normal_(embedding.weight, std=std)
    return embedding


def _mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    return torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()


def _pool(x_BCT: Tensor, keep_B1T: Tensor) -> Tensor:
    """The largest and the mean over the tokens that count: (B, C, T) → (B, 2 C)."""
    largest = x_BCT.masked_fill(~keep_B1T, _LOWEST).amax(2)
    mean = (x_BCT * keep_B1T).sum(2) / keep_B1T.sum(2).clamp(min=1)
    return torch.cat([largest, mean], 1)
