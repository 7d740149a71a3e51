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
    attribute_map = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head",
                     "intermediate_size": "n_hidden", "max_position_embeddings": "n_ctx",
                     "tie_word_embeddings": "tie_head"}
    keys_to_ignore_at_inference = [CACHE]

    def settings(self) -> Config:
        return Config(**{f.name: getattr(self, f.name) for f in fields(Config) if f.name != "extra"})

    @property
    def num_hidden_layers(self) -> int:
        """The layers of a cache: depths that have keys and values of their own."""
        return self.settings().kv_loops * self.settings().n_unique


class DepthCache:
    """What model.py asks of a cache, on top of transformers' Cache (None: nothing is kept), for one forward pass.

    A stored layer runs at n_loop depths and has other keys and values at each, so what transformers calls the index of
    a layer is the depth, loop * n_unique + layer.

    positions (B or 1, T): None counts from the first token in the cache. padding (B, tokens so far): 0 for tokens that
    do not count; or the whole mask (B, 1, T, n), which `generate` makes for a static cache.
    """

    def __init__(self, config: Config, cache, idx: Tensor, positions: Tensor | None, padding: Tensor | None):
        past = 0 if cache is None else cache.get_seq_length()
        self.config, self.cache, self.end = config, cache, past + idx.size(1)
        self.at = torch.arange(idx.size(1), device=idx.device) + past    # (T,), the tokens' places in the cache
        positions = self.at[None] if positions is None else positions
        angles = rope_angles(positions.flatten(), config)
        self.rope = tuple(part.unflatten(0, positions.shape) for part in angles)  # (B or 1, T, 1, rotated)
        self.padding = None if padding is not None and padding.dim() == 2 and padding.all() else padding
        self.kv = [()] * config.n_unique                                 # (B, K, n, D) of each stored layer's last run

    def kv_loop(self, loop: int) -> int | None:
        return loop if loop < self.config.kv_loops else None

    def extend(self, loop: int, T: int) -> tuple[Tensor, Tensor]:
        return self.rope

    def attend(self, loop: int, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        if k is not None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)                  # (B, K, T, D)
            if self.cache is not None:
                depth = loop * self.config.n_unique + layer
                k, v = self.cache.update(k, v, depth, {"cache_position": self.at})  # transformers 5.0 reads the last
            self.kv[layer] = k, v
            if loop == layer == 0:
                self.mask = self.make_mask(k.size(2))
        return causal_attention(q, *self.kv[layer], self.mask)

    def make_mask(self, n: int) -> Tensor | None:
        """(B or 1, 1, T, n), True where a token attends to one of the cache's n keys; None if to all up to it."""
        if self.padding is None and n == self.end:                       # a static cache has keys that are still empty
            return None
        if self.padding is not None and self.padding.dim() == 4:
            return self.padding
        keys, at = torch.arange(n, device=self.at.device), self.at[:, None]
        if self.padding is None:
            return (keys <= at)[None, None]
        padding = F.pad(self.padding.bool(), (0, n - self.padding.size(1)))[:, None, None]  # (B, 1, 1, n)
        return (keys <= at) & padding | (keys == at)         # padding attends to itself: a softmax over nothing is NaN


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
        """Logits (B, kept, V) in fp32 or wider for input_ids (B, T), which continue the sequences in the cache."""
        cache = past_key_values if cache is None else cache              # the old name and the new one
        self.model.checkpointing = self.gradient_checkpointing and self.training
        if cache is None and (not self.training if use_cache is None else use_cache) and not self.model.checkpointing:
            cache = DynamicCache()
        depths = DepthCache(self.model.config, cache, input_ids, position_ids, attention_mask)
        x = self.model(input_ids, depths)[-1]                            # (B, T, C)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(x[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
