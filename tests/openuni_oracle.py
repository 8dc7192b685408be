"""OpenUni's text encoder in PyTorch, as its code computes it: queries after the padded prompt,
padding masked and not counted."""

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            setattr(self, name, nn.Linear(width, width))

    def forward(self, x):
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        seen = nn.functional.scaled_dot_product_attention(
            split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        )
        return self.out_proj(seen.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        inner = nn.functional.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh")
        return x + self.mlp["fc2"](inner)


class Encoder(nn.Module):
    """published: config.json of the text encoder. Its state has the keys of both checkpoints."""

    def __init__(self, published: dict):
        super().__init__()
        told = published["llm_config"]
        width, connector = told["hidden_size"], published["connector"]
        # As in the published folder, and without effect on texts that are shorter.
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": told["rope_theta"]}
        self.language_model = Qwen2ForCausalLM(Qwen2Config(**told, rope_parameters=rope))
        self.language_model.lm_head = None
        self.meta_queries = nn.Parameter(torch.empty(published["num_queries"], width))
        layers = (
            Layer(width, connector["num_attention_heads"], connector["intermediate_size"])
            for _ in range(connector["num_hidden_layers"])
        )
        self.connector = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.projector = nn.Linear(width, published["caption_channels"])

    @torch.no_grad()
    def forward(self, ids, mask):
        queries = self.meta_queries.expand(len(ids), -1, -1)
        embedded = self.language_model.model.embed_tokens(ids)
        mask = torch.cat([mask, mask.new_ones(queries.shape[:2])], dim=1)
        states = self.language_model.model(
            inputs_embeds=torch.cat([embedded, queries], dim=1), attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        ).last_hidden_state[:, -len(self.meta_queries):]
        for layer in self.connector["layers"]:
            states = layer(states)
        return self.projector(states)
