"""The text encoders, built from the names and shapes of their weights.

Two namings of one architecture (Radford et al. 2021, arXiv 2103.00020): transformers' modeling_clip.py, in which SD 1.x and
SDXL carry OpenAI's ViT-L, and open_clip's transformer.py, in which SD 2.x carries ViT-H and SDXL and its refiner ViT-bigG.
Both give every layer's output: which one the UNet was trained on differs by family (family.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import LayerNorm, linear
from .ops import attention
from .shapes import Shapes, below, numbered

HEAD_DIM = 64  # of every published CLIP text tower: 12, 16 and 20 heads for 768, 1024 and 1280 channels


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
        self.layer_norm1 = LayerNorm(width)
        self.mlp = MLP(below(shapes, "mlp"))
        self.layer_norm2 = LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D)
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(part) for part in numbered(below(shapes, "layers")))


class TextTransformer(nn.Module):
    """OpenAI's text encoder in transformers' naming."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.embeddings = Embeddings(below(shapes, "embeddings"))
        self.encoder = Encoder(below(shapes, "encoder"))
        self.final_layer_norm = LayerNorm(shapes["final_layer_norm.weight"][0])
        self.depth = len(self.encoder.layers)

    def hidden_states(self, ids: Tensor) -> list[Tensor]:
        """ids (B, L <= 77) -> the embeddings and the output of every layer, (B, L, D) each."""
        states = [self.embeddings(ids)]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return states

    def final_norm(self, x: Tensor) -> Tensor:
        return self.final_layer_norm(x)


class CLIPTextModel(nn.Module):
    """The text transformer under the name that most files give it, `text_model`."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.text_model = TextTransformer(below(shapes, "text_model"))
        self.depth = self.text_model.depth

    def hidden_states(self, ids: Tensor) -> list[Tensor]:
        return self.text_model.hidden_states(ids)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.text_model.final_norm(x)


class FusedAttention(nn.Module):
    """open_clip keeps q, k and v in one matrix, in this order (torch.nn.MultiheadAttention)."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(shapes["in_proj_weight"]))
        self.in_proj_bias = nn.Parameter(torch.empty(shapes["in_proj_bias"]))
        self.out_proj = linear(shapes, "out_proj")
        self.heads = max(1, shapes["out_proj.weight"][0] // HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D)
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self.out_proj(attention(q, k, v, self.heads, causal=True))


class OpenMLP(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.c_fc, self.c_proj = linear(shapes, "c_fc"), linear(shapes, "c_proj")

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))  # exact, unlike OpenAI's


class ResidualAttentionBlock(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        width = shapes["ln_1.weight"][0]
        self.ln_1, self.attn = LayerNorm(width), FusedAttention(below(shapes, "attn"))
        self.ln_2, self.mlp = LayerNorm(width), OpenMLP(below(shapes, "mlp"))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class OpenTextTransformer(nn.Module):
    """open_clip's text encoder in its own naming."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.empty(shapes["positional_embedding"]))
        if "text_projection" in shapes:  # some merges of SD 2.x, which has no use for it, dropped it
            self.text_projection = nn.Parameter(torch.empty(shapes["text_projection"]))
        blocks = [ResidualAttentionBlock(part) for part in numbered(below(shapes, "transformer.resblocks"))]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.depth = len(blocks)
        self.token_embedding = embedding(shapes, "token_embedding")
        self.ln_final = LayerNorm(shapes["ln_final.weight"][0])

    def hidden_states(self, ids: Tensor) -> list[Tensor]:
        """ids (B, L <= 77) -> the embeddings and the output of every block, (B, L, D) each."""
        states = [self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]]
        for block in self.transformer["resblocks"]:  # type: ignore[attr-defined]
            states.append(block(states[-1]))
        return states

    def final_norm(self, x: Tensor) -> Tensor:
        return self.ln_final(x)

    def pooled(self, ids: Tensor, last: Tensor) -> Tensor:
        """The whole text in one vector, (B, P): the last state (B, L, D) at the end token, which has the largest id."""
        ends = ids.argmax(dim=-1)
        return self.ln_final(last)[torch.arange(len(ids)), ends] @ self.text_projection


TextEncoder = TextTransformer | CLIPTextModel | OpenTextTransformer


def text_encoder(shapes: Shapes) -> TextEncoder:
    """Some merges (NovelAI's descendants) dropped `text_model.` from the names; the module follows the file."""
    if "positional_embedding" in shapes:
        return OpenTextTransformer(shapes)
    return CLIPTextModel(shapes) if below(shapes, "text_model") else TextTransformer(shapes)
