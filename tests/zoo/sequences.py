"""Hand-written networks on sequences."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.specimen import Specimen

__all__ = ["SPECIMENS"]


class LstmLanguageModel(nn.Module):
    """Embedding, two LSTM layers with dropout, decoder tied to the embedding."""

    def __init__(self, num_tokens: int = 11, width: int = 8) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.encoder = nn.Embedding(num_tokens, width)
        self.rnn = nn.LSTM(width, width, num_layers=2, dropout=0.2, batch_first=True)
        self.decoder = nn.Linear(width, num_tokens)
        self.decoder.weight = self.encoder.weight

    def forward(self, tokens: Tensor) -> Any:
        output, _ = self.rnn(self.drop(self.encoder(tokens)))
        return self.decoder(self.drop(output))


class HandWrittenRnn(nn.Module):
    """Elman's network as people write it out: two products joined before one tanh, at each step."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.i2h, self.h2h = nn.Linear(5, width), nn.Linear(width, width, bias=False)
        self.h2o = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Any:
        h = x.new_zeros(x.shape[0], self.h2h.in_features)
        for step in range(x.shape[1]):
            h = torch.tanh(self.i2h(x[:, step]) + self.h2h(h))
        return self.h2o(h)


class CausalSelfAttention(nn.Module):
    """Attention as people write it: one projection for queries, keys and values, heads split by a view."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        q, k, v = self.qkv(x).split(width, dim=2)
        q, k, v = (t.view(batch, length, self.num_heads, width // self.num_heads).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        weights = self.dropout(F.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1))
        y = (weights @ v).transpose(1, 2).contiguous().view(batch, length, width)
        return self.proj(y)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm: what attention and MLP give is added to the stream."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, num_heads)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "act": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        )
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        m = self.mlp
        return x + self.dropout(m["c_proj"](m["act"](m["c_fc"](self.ln_2(x)))))  # type: ignore[no-any-return]


class PreNormTransformer(nn.Module):
    def __init__(self, num_tokens: int = 11, width: int = 12, depth: int = 3) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(num_tokens, width), nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width, 3) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_tokens, bias=False)

    def forward(self, tokens: Tensor) -> Any:
        places = torch.arange(tokens.size(1), device=tokens.device)
        x = self.tokens(tokens) + self.places(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class TorchTransformer(nn.Module):
    """A classifier around torch's own encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Any:
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


def tokens() -> tuple[Tensor]:
    return (torch.randint(0, 11, (3, 7)),)


SPECIMENS = (
    Specimen(
        "LSTM language model",
        "own",
        LstmLanguageModel,
        tokens,
        exempt="recurrent",
        declined={"rnn": "recurrent gates"},
    ),
    Specimen("hand-written RNN", "own", HandWrittenRnn, lambda: (torch.randn(4, 6, 5),)),
    Specimen("pre-norm transformer", "own", PreNormTransformer, tokens),
    Specimen("TransformerEncoder", "torch", TorchTransformer, tokens),
)
