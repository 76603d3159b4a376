"""HLA: a Llama whose attention caches short latents in place of keys and values. Written by `hla convert`.

Everything but the attention is transformers' Llama. This is the readable twin of the C++ program: keys and values are
rebuilt from the latents at every step, which saves memory, not time.

Shapes: B batch, T new tokens, S cached and new tokens, H query heads, K kv heads, d head size, m = d / 2 frequencies,
c = fast_frequencies. The two halves of a head (Llama's RoPE turns pair f of them by frequency f) have a dimension
of their own: (…, 2, m).
"""

import torch
from torch import nn
from transformers import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    eager_attention_forward,
)

from .configuration_hla import HlaConfig

CACHE_NAMES = ("cache", "past_key_values", "past_key_value")  # what versions of transformers call the argument


def cache_in(kwargs):
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def rotate(x, cos, sin):
    """Turns the pairs of x (B, S, heads, 2, F) by the tables (B, S, F)."""
    first, second = x.unbind(-2)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-2)


def positions_so_far(cache, position_ids):
    """Positions (B or 1, S) of the cached tokens and of the new ones, position_ids (B or 1, T)."""
    past = 0 if cache is None else cache.get_seq_length()
    if past == 0:
        return position_ids
    known = getattr(cache, "positions", position_ids[:, :0])
    if known.shape[1] < past or len({1, len(known), len(position_ids)}) > 2:
        # A cache that was made elsewhere: its tokens are taken to be those just before the new ones.
        known = position_ids[:, :1] + torch.arange(-past, 0, device=position_ids.device)
    known = known.to(position_ids.device)  # of the layer that was the last to see them
    batch = max(len(known), len(position_ids))
    return torch.cat([known[:, :past].expand(batch, -1), position_ids.expand(batch, -1)], dim=1)


class ComplexUp(nn.Module):
    """k_up of rope `latent`: for every fast frequency f a complex matrix (K, k_ranks[f]), packed along the last
    dimension of weight (2, K, R), real and imaginary parts."""

    def __init__(self, kv_heads, k_ranks, bias, std):
        super().__init__()
        self.frequencies = [f for f, rank in enumerate(k_ranks) for _ in range(rank)]  # of every complex latent
        self.fast = len(k_ranks)
        self.weight = nn.Parameter(std * torch.randn(2, kv_heads, len(self.frequencies)))
        self.bias = nn.Parameter(torch.zeros(kv_heads * 2 * self.fast)) if bias else None

    def forward(self, latent):
        """Rotated latents (B, S, 2, R) to rotated keys, without the bias (B, S, K, 2, c)."""
        of_frequency = torch.arange(self.fast, device=latent.device)[:, None] == torch.tensor(
            self.frequencies, device=latent.device
        )  # (c, R)
        real, imaginary = self.weight[:, :, None] * of_frequency  # (K, c, R) each
        matrix = torch.stack(
            [torch.cat([real, -imaginary], dim=-1), torch.cat([imaginary, real], dim=-1)], dim=1
        )  # (K, 2, c, 2R): (a + ib)(x + iy)
        keys = nn.functional.linear(latent.flatten(-2), matrix.flatten(0, 2))
        return keys.unflatten(-1, matrix.shape[:3])


class HlaAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        hla, layer = config.hla, config.hla["layers"][layer_idx]
        self.rope = hla["rope"]
        self.rotary_fraction = hla.get("rotary_fraction", 1.0)
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.fast = layer.get("fast_frequencies", 0)
        self.slow = self.head_dim // 2 - self.fast
        # Read by the attention functions of transformers.
        self.num_key_value_groups = self.heads // self.kv_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True

        bias = config.attention_bias
        latent_bias = hla.get("latent_bias", bias)
        hidden, q_rank, self.kv_rank = config.hidden_size, layer.get("q_rank", 0), layer.get("kv_rank", 0)
        k_ranks = layer["k_ranks"] if self.rope == "latent" else None
        self.k_floats = layer.get("k_rank", 0) if k_ranks is None else 2 * sum(k_ranks)
        if q_rank:
            self.q_down = nn.Linear(hidden, q_rank, bias=False)
            self.q_up = nn.Linear(q_rank, self.heads * self.head_dim, bias=bias)
        else:
            self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=bias)
        if self.k_floats:
            self.k_down = nn.Linear(hidden, self.k_floats, bias=False)
            if k_ranks is None:
                self.k_up = nn.Linear(self.k_floats, self.kv_heads * 2 * self.fast, bias=latent_bias)
            else:
                self.k_up = ComplexUp(self.kv_heads, k_ranks, latent_bias, config.initializer_range)
        if self.kv_rank:
            self.kv_down = nn.Linear(hidden, self.kv_rank, bias=False)
            rows = self.kv_heads * (2 * self.slow + self.head_dim)  # slow keys, then values
            self.kv_up = nn.Linear(self.kv_rank, rows, bias=latent_bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=hla.get("output_bias", bias))

    def rotate_pairs(self, latent, heads, cos, sin):
        """Rope `paper`: neighbours in a latent (B, T, r) turn as pairs, which cycle through the first r / (2 heads)
        frequencies."""
        pairs = latent.shape[-1] // 2
        ladder = min(max(latent.shape[-1] // (2 * heads), 1), self.head_dim // 2)
        turning = int(self.rotary_fraction * pairs + 0.5)
        frequencies = [i % ladder for i in range(turning)]
        turned = latent[..., None, : 2 * turning].unflatten(-1, (turning, 2)).transpose(-1, -2)
        turned = rotate(turned, cos[..., frequencies], sin[..., frequencies])
        return torch.cat([turned.transpose(-1, -2).flatten(-3), latent[..., 2 * turning :]], dim=-1)

    def queries(self, x, cos, sin):
        """x (B, T, D) to rotated queries (B, T, H, d)."""
        if self.rope == "paper":
            q = self.q_up(self.rotate_pairs(self.q_down(x), self.heads, cos, sin))
            return q.unflatten(-1, (self.heads, self.head_dim))
        q = self.q_proj(x) if hasattr(self, "q_proj") else self.q_up(self.q_down(x))
        return rotate(q.unflatten(-1, (self.heads, 2, self.head_dim // 2)), cos, sin).flatten(-2)

    def latents(self, x, cos, sin):
        """x (B, T, D) to what is cached of it (B, T, k_floats + kv_rank): the k latent (rotated, but for rope
        `original`), then the kv latent."""
        parts = []
        if self.k_floats:
            k = self.k_down(x)
            if self.rope == "latent":
                f = self.k_up.frequencies
                k = rotate(k.unflatten(-1, (1, 2, len(f))), cos[..., f], sin[..., f]).flatten(-3)
            elif self.rope == "paper":
                k = self.rotate_pairs(k, self.kv_heads, cos, sin)
            parts.append(k)
        if self.kv_rank:
            parts.append(self.kv_down(x))
        return torch.cat(parts, dim=-1)

    def fast_keys(self, latent, cos, sin):
        """The k latent (B, S, k_floats) to rotated keys (B, S, K, 2, c)."""
        if self.rope != "latent":
            keys = self.k_up(latent).unflatten(-1, (self.kv_heads, 2, self.fast))
            return keys if self.rope == "paper" else rotate(keys, cos, sin)
        keys = self.k_up(latent.unflatten(-1, (2, -1)))
        if self.k_up.bias is None:
            return keys
        return keys + rotate(self.k_up.bias.view(1, 1, self.kv_heads, 2, self.fast), cos, sin)

    def rebuild(self, latent, cos, sin):
        """Latents (B, S, k_floats + kv_rank) of all tokens to rotated keys and values (B, S, K, d)."""
        k_latent, kv_latent = latent.split([self.k_floats, self.kv_rank], dim=-1)
        c, shape = self.fast, (*latent.shape[:2], self.kv_heads)
        fast, slow = latent.new_zeros(*shape, 2, c), latent.new_zeros(*shape, 2, self.slow)
        values = latent.new_zeros(*shape, self.head_dim)
        if self.k_floats:
            fast = self.fast_keys(k_latent, cos[..., :c], sin[..., :c])
        if self.kv_rank:
            values_at = self.kv_heads * 2 * self.slow
            up = self.kv_up(kv_latent)
            slow = up[..., :values_at].unflatten(-1, (self.kv_heads, 2, self.slow))
            slow = rotate(slow, cos[..., c:], sin[..., c:])
            values = up[..., values_at:].unflatten(-1, (self.kv_heads, self.head_dim))
        return torch.cat([fast, slow], dim=-1).flatten(-2), values

    def forward(self, hidden_states, positions, rope, attention_mask=None, **kwargs):
        """positions (B or 1, S) of the cached tokens and the new ones; rope: their cos and sin, (B or 1, S, m)."""
        cache = cache_in(kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        cos, sin = rope
        new = slice(-hidden_states.shape[1], None)
        queries = self.queries(hidden_states, cos[:, new], sin[:, new])
        latent = self.latents(hidden_states, cos[:, new], sin[:, new])
        if cache is not None:
            # As the keys of one head. Values stay empty: (B, 1, S, 0).
            empty = latent.new_empty(len(latent), 1, latent.shape[1], 0)
            latent = cache.update(latent.unsqueeze(1), empty, self.layer_idx)[0].squeeze(1)
            cache.positions = positions
        keys, values = self.rebuild(latent, cos, sin)

        name = self.config._attn_implementation
        attend = eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        output, weights = attend(
            self,
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class HlaModel(LlamaModel):
    config_class = HlaConfig
    _can_compile_fullgraph = False
    _can_record_outputs = {"hidden_states": LlamaDecoderLayer, "attentions": HlaAttention}

    def __init__(self, config):
        super().__init__(config)
        for layer_idx, layer in enumerate(self.layers):
            layer.self_attn = HlaAttention(config, layer_idx)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, *, inputs_embeds=None, **kwargs):
        """Llama's, with the positions of cached tokens: keys that are rebuilt are rotated again."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = cache_in(kwargs)
        if isinstance(cache, StaticCache):
            raise NotImplementedError("HLA needs a cache that grows (DynamicCache), got StaticCache")
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        positions = positions_so_far(cache, position_ids)
        cos, sin = self.rotary_emb(inputs_embeds, positions)  # both halves of a head have the same
        m = cos.shape[-1] // 2
        return super().forward(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            positions=positions,
            rope=(cos[..., :m], sin[..., :m]),
            **kwargs,
        )


class HlaForCausalLM(LlamaForCausalLM):
    config_class = HlaConfig
    _can_compile_fullgraph = False
    _can_record_outputs = HlaModel._can_record_outputs

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)  # LlamaForCausalLM's would make a LlamaModel first
        self.model = HlaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
