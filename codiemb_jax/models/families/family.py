"""What a family consists of, and the parts that decoders share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from codiemb_jax.errors import UserError, listed
from codiemb_jax.models.decoder import DecoderConfig
from codiemb_jax.models.rope import Rope


class Weight(NamedTuple):
    """One line of a family's table: a weight's path in our tree and its name in the checkpoint.

    `{layer}` in the name stands for the index along the first axis of our stacked weight.
    """

    ours: str
    theirs: str
    transpose: bool
    """PyTorch keeps [out, in]; we keep [in, out]."""


@dataclass(frozen=True)
class Family:
    model_type: str
    read_config: Callable[[Mapping[str, Any]], DecoderConfig]
    weights: tuple[Weight, ...]
    untrained: tuple[str, ...]
    """Names (`*` stands for any part) that a checkpoint may hold and an encoder does not use; they are carried
    along unchanged."""
    stock: Callable[[dict[str, Any]], dict[str, Any]]
    """config.json -> config.json of the equal architecture that transformers itself knows."""


LM_EXTRAS = ("lm_head.weight", "layers.*.self_attn.rotary_emb.inv_freq")
"""What language-model checkpoints hold beyond the decoder: the head, and RoPE's frequencies in old ones."""


def decoder_weights(qk_norm: bool) -> tuple[Weight, ...]:
    """The table of a Llama-like decoder, after the optional prefix `model.`."""
    layer = "layers.{layer}."
    table = [
        Weight("embedding", "embed_tokens.weight", False),
        Weight("layers.attention_norm", layer + "input_layernorm.weight", False),
        Weight("layers.q", layer + "self_attn.q_proj.weight", True),
        Weight("layers.k", layer + "self_attn.k_proj.weight", True),
        Weight("layers.v", layer + "self_attn.v_proj.weight", True),
        Weight("layers.o", layer + "self_attn.o_proj.weight", True),
        Weight("layers.mlp_norm", layer + "post_attention_layernorm.weight", False),
        Weight("layers.gate", layer + "mlp.gate_proj.weight", True),
        Weight("layers.up", layer + "mlp.up_proj.weight", True),
        Weight("layers.down", layer + "mlp.down_proj.weight", True),
        Weight("norm", "norm.weight", False),
    ]
    if qk_norm:
        table.append(Weight("layers.q_norm", layer + "self_attn.q_norm.weight", False))
        table.append(Weight("layers.k_norm", layer + "self_attn.k_norm.weight", False))
    return tuple(table)


def read_decoder_config(hf: Mapping[str, Any], *, qk_norm: bool, default_head_dim: int | None = None) -> DecoderConfig:
    """config.json -> DecoderConfig; what the decoder does not compute is an error, all of it at once.

    default_head_dim: where config.json names none; None: hidden_size / num_attention_heads.
    """
    required = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
    ]
    problems = [f"{name} is missing" for name in required if name not in hf]
    if (activation := hf.get("hidden_act", "silu")) != "silu":
        problems.append(f"hidden_act {activation!r} is not supported; supported is silu")
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if hf.get(name):
            problems.append(f"{name} true is not supported; supported is false")
    if problems:
        raise UserError("config.json:\n" + listed(problems))
    heads = hf["num_attention_heads"]
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        mlp_size=hf["intermediate_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or default_head_dim or hf["hidden_size"] // heads,
        norm_eps=hf["rms_norm_eps"],
        rope=Rope.from_hf(dict(hf)),
        qk_norm=qk_norm,
        max_positions=hf.get("max_position_embeddings", 2048),
        initializer_range=hf.get("initializer_range", 0.02),
    )
