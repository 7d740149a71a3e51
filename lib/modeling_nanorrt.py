"""A looped Transformer for transformers: the classes around model.py, which lies beside this file.

nanoRRT wrote this folder (convert.py --hf). Load it with AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True): the block of layers is stored once, and runs n_loop times.

Paper: Relaxed Recursive Transformers, https://arxiv.org/abs/2410.20672
"""

from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .model import Config, RecursiveTransformer, causal_attention, rope_angles

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"  # its name of old


class NanoRRTConfig(PreTrainedConfig):
    """The settings of model.py under their own names, and under those that transformers reads."""

    model_type = "nanorrt"
    attribute_map = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                     "num_key_value_heads": "n_kv_head", "intermediate_size": "n_hidden",
                     "max_position_embeddings": "n_ctx", "tie_word_embeddings": "tie_head"}
    keys_to_ignore_at_inference = [CACHE]

    def settings(self) -> Config:
        return Config(**{f.name: getattr(self, f.name) for f in fields(Config) if f.name != "extra"})


class DepthCache:
    """What model.py asks of a cache, for one forward pass, on top of transformers' Cache (None: nothing is kept).

    A stored layer runs at n_loop depths with different keys and values at each, so transformers' number of a layer is
    the depth, loop * n_unique + layer.
    """

    def __init__(self, config: Config, cache, rope: tuple[Tensor, Tensor], padding: Tensor | None):
        self.config, self.cache, self.rope, self.padding = config, cache, rope, padding
        self.past = 0 if cache is None else cache.get_seq_length()       # before this pass adds its tokens
        self.kv = [()] * config.n_unique                                 # (B, K, n, D) of each stored layer's last run

    def kv_loop(self, loop: int) -> int | None:
        return loop if loop < self.config.kv_loops else None

    def extend(self, loop: int, T: int) -> tuple[Tensor, Tensor]:
        return self.rope

    def attend(self, loop: int, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        if k is not None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)                  # (B, K, T, D)
            if self.cache is not None:
                k, v = self.cache.update(k, v, loop * self.config.n_unique + layer)
            if loop == layer == 0:
                self.mask = causal_mask(self.padding, self.past, q.size(1), k.size(2), q.device)
            self.kv[layer] = k, v
        return causal_attention(q, *self.kv[layer], self.mask)


def causal_mask(padding: Tensor | None, past: int | Tensor, T: int, n: int, device) -> Tensor | None:
    """(B or 1, 1, T, n), True where one of T tokens after `past` attends to one of n keys, of which a static cache has
    some that are still empty; None if to all up to it. padding (B, past + T): 0 for tokens that do not count; a mask
    of four dimensions (`generate` with a static cache) is returned as it is."""
    if padding is not None and padding.dim() == 4:
        return padding
    if padding is not None and padding.all():
        padding = None
    if padding is None and past + T == n:
        return None
    at = torch.arange(T, device=device)[:, None] + past                  # (T, 1)
    keys = torch.arange(n, device=device)
    mask = keys <= at                                                    # (T, n)
    if padding is None:
        return mask[None, None]
    padding = F.pad(padding.bool(), (0, n - padding.size(1)))[:, None, None]  # (B, 1, 1, n)
    return mask & padding | (keys == at)         # a padding token attends to itself: softmax over nothing is not finite


class NanoRRTForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanoRRTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RecursiveTransformer"]  # device_map: every loop comes back to each layer
    _supports_sdpa = True
    _can_compile_fullgraph = True

    def __init__(self, config: NanoRRTConfig):
        super().__init__(config)
        self.model = RecursiveTransformer(config.settings())
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (nn.Embedding, nn.Linear)):                # the others are by their constructors
            super()._init_weights(module)

    def get_input_embeddings(self):
        return self.model.embed

    def set_input_embeddings(self, embed):
        self.model.embed = embed

    def get_output_embeddings(self):
        return self.model.head                                           # None if it is the embedding

    def set_output_embeddings(self, head):
        self.model.head = head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
                past_key_values=None, cache=None, labels: Tensor | None = None, use_cache: bool | None = None,
                logits_to_keep: int | Tensor = 0, **kwargs) -> CausalLMOutputWithPast:
        """Logits (B, T, V) in fp32 for input_ids (B, T), which continue the sequences in the cache."""
        cache = past_key_values if cache is None else cache              # the old name and the new one
        self.model.checkpointing = self.gradient_checkpointing and self.training
        if cache is None and (not self.training if use_cache is None else use_cache) and not self.model.checkpointing:
            cache = DynamicCache()
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(input_ids.size(1), device=input_ids.device)[None] + past
        angles = rope_angles(position_ids.flatten(), self.model.config)
        rope = tuple(part.unflatten(0, position_ids.shape) for part in angles)  # (B or 1, T, 1, rotated)
        x = self.model(input_ids, DepthCache(self.model.config, cache, rope, attention_mask))[-1]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(x[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
