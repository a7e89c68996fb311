"""The CLIP text encoder, built from the names and shapes of its weights.

Reference: openai/CLIP (Radford et al. 2021, arXiv 2103.00020), in the naming of transformers' modeling_clip.py, which is
what `cond_stage_model.transformer` of an SD 1.x file has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import linear
from .ops import attention
from .shapes import Shapes, below, numbered

HEAD_DIM = 64  # of every published CLIP text tower: 12 heads for 768 channels


def embedding(shapes: Shapes, name: str) -> nn.Embedding:
    count, width = shapes[f"{name}.weight"]
    return nn.Embedding(count, width)


class Embeddings(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.token_embedding = embedding(shapes, "token_embedding")
        self.position_embedding = embedding(shapes, "position_embedding")

    def forward(self, ids: Tensor) -> Tensor:  # (B, L) -> (B, L, D)
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class Attention(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (
            linear(shapes, name) for name in ("k_proj", "v_proj", "q_proj", "out_proj")
        )
        self.heads = max(1, shapes["q_proj.weight"][0] // HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D); a token sees itself and those before it
        return self.out_proj(attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True))


class MLP(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.fc1, self.fc2 = linear(shapes, "fc1"), linear(shapes, "fc2")

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # quick_gelu, which OpenAI's CLIP was trained with


class EncoderLayer(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        width = shapes["layer_norm1.weight"][0]
        self.self_attn = Attention(below(shapes, "self_attn"))
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = MLP(below(shapes, "mlp"))
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D)
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(part) for part in numbered(below(shapes, "layers")))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class TextTransformer(nn.Module):
    """ids (B, L <= 77) -> the last hidden state after the final norm, (B, L, D): the context of SD 1.x."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.embeddings = Embeddings(below(shapes, "embeddings"))
        self.encoder = Encoder(below(shapes, "encoder"))
        self.final_layer_norm = nn.LayerNorm(shapes["final_layer_norm.weight"][0])

    def forward(self, ids: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))


class CLIPTextModel(nn.Module):
    """The text transformer under the name that most files give it, `text_model`."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.text_model = TextTransformer(below(shapes, "text_model"))

    def forward(self, ids: Tensor) -> Tensor:
        return self.text_model(ids)


def text_encoder(shapes: Shapes) -> nn.Module:
    """Some merges (NovelAI's descendants) dropped `text_model.` from the names; the module follows the file."""
    return CLIPTextModel(shapes) if below(shapes, "text_model") else TextTransformer(shapes)
