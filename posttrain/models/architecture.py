"""What a decoder is: `DecoderConfig`, the record that families (`llama.py` ...) make of a config.json and that
`decoder.py` builds from. The defaults are those of Llama."""

from dataclasses import dataclass
from typing import Literal

from posttrain.models.rope import RopeConfig

VOCAB_MULTIPLE = 128
"""The vocabulary is padded to it in memory, so that every usual tensor axis divides it."""


@dataclass(frozen=True)
class LayerKind:
    """What may differ between the layers of one model."""

    window: int | None = None
    """Keys that a token sees: itself and the `window - 1` before it (`sliding_window`); None: its whole segment."""
    rope: int | None = 0
    """Which of `DecoderConfig.ropes`; None: no rotary positions."""


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts: what the router chooses from, and how."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    """Width F of one expert."""
    norm_topk_prob: bool = True
    """Whether the weights of the chosen experts add up to 1; otherwise they are those of a softmax over all experts."""
    router_aux_loss_coef: float = 0.0
    """Of the load-balance loss, unless a run says otherwise."""


@dataclass(frozen=True)
class DecoderConfig:
    """Architecture, with the names that Hugging Face configs use where they have one."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    ropes: tuple[RopeConfig, ...] = (RopeConfig(),)
    layer_kinds: tuple[LayerKind, ...] = (LayerKind(),)
    """The repeating group: layer i is `layer_kinds[i % len(layer_kinds)]`."""
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Of queries, keys and values."""
    attention_out_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMS norm of queries and keys before their rotation: of each head's dims (Qwen 3), or of all heads' together
    (OLMo 2)."""
    pre_norm: bool = True
    """Norms of what enters attention and MLP."""
    post_norm: bool = False
    """Norms of what leaves them, before it is added to the residual stream."""
    norm_offset: float = 0.0
    """Added to every norm's weight: 1 in Gemma."""
    attn_softcap: float | None = None
    """`cap * tanh(scores / cap)` on attention scores (Gemma 2)."""
    logit_softcap: float | None = None
    """The same on logits."""
    attention_scale: float | None = None
    """Of queries times keys; None: head_dim^-0.5."""
    embed_scale: float | None = None
    """Of token embeddings, rounded to their dtype as transformers does."""
    num_labels: int = 0
    """0: a language model. 1: a reward model, which has a score (`score_head`) and no vocabulary projection."""
    moe: MoEConfig | None = None
    """Experts in the MLP's place, in every layer; None: dense."""

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def rope(self) -> RopeConfig:
        """The first of `ropes`: the only one in most families."""
        return self.ropes[0]

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        return tuple(self.layer_kinds[i % len(self.layer_kinds)] for i in range(self.num_hidden_layers))
