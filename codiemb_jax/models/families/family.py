"""What a family consists of, and the parts that decoders share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

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


Positive = Annotated[int, Field(strict=True, gt=0)]


class HFDecoder(BaseModel):
    """The keys of config.json that a decoder is made of; a value that it does not compute is an error."""

    model_config = ConfigDict(extra="ignore")

    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive | None = None
    head_dim: Positive | None = None
    rms_norm_eps: Annotated[float, Field(gt=0)]
    max_position_embeddings: Positive = 2048
    initializer_range: Annotated[float, Field(ge=0)] = 0.02
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    use_sliding_window: Literal[False] | None = False

    @model_validator(mode="after")
    def _heads(self) -> "HFDecoder":
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_key_value_heads must divide num_attention_heads")
        if self.head_dim % 2:
            raise ValueError("head_dim must be even, for RoPE turns pairs of dimensions")
        return self


def check_config(hf: Mapping[str, Any]) -> HFDecoder:
    """UserError that lists every key of config.json that cannot be used."""
    try:
        return HFDecoder.model_validate(hf)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            field = ".".join(map(str, problem["loc"]))
            found = f", found {problem['input']!r}" if field and problem["type"] != "missing" else ""
            problems.append(f"{field}{': ' if field else ''}{problem['msg'].removeprefix('Value error, ')}{found}")
        raise UserError("config.json cannot be used:\n" + listed(problems)) from error


def read_decoder_config(
    hf: Mapping[str, Any], *, qk_norm: bool, defaults: Mapping[str, Any] = MappingProxyType({})
) -> DecoderConfig:
    """config.json -> DecoderConfig.  `defaults` stand for keys that config.json lacks, as in transformers."""
    checked = check_config({**defaults, **hf})
    assert checked.num_key_value_heads and checked.head_dim  # resolved by the check
    return DecoderConfig(
        vocab_size=checked.vocab_size,
        hidden_size=checked.hidden_size,
        mlp_size=checked.intermediate_size,
        layers=checked.num_hidden_layers,
        heads=checked.num_attention_heads,
        kv_heads=checked.num_key_value_heads,
        head_dim=checked.head_dim,
        norm_eps=checked.rms_norm_eps,
        rope=Rope.from_hf(dict(hf)),
        qk_norm=qk_norm,
        max_positions=checked.max_position_embeddings,
        initializer_range=checked.initializer_range,
    )
