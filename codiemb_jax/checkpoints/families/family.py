"""What a family consists of, and how a config.json is checked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from codiemb_jax.config import Positive
from codiemb_jax.errors import UserError, format_problems
from codiemb_jax.models.decoder import Decoder
from codiemb_jax.models.encoder import Encoder


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
    model: type[Decoder] | type[Encoder]
    read_config: Callable[[Mapping[str, Any]], Any]
    """config.json -> what `model` is made of."""
    prefix: str
    """What may stand before the weights' names: the checkpoint of a base model leaves it out."""
    weights: tuple[Weight, ...]
    passthrough: tuple[str, ...]
    """Names (`*` stands for any part) that a checkpoint may hold and an encoder does not use; they are carried
    along unchanged."""
    stock: Callable[[dict[str, Any]], dict[str, Any]]
    """config.json -> config.json of the equal architecture that transformers itself knows."""
    causal: bool = False
    """Whether transformers attends causally where config.json says nothing."""


class HFConfig(BaseModel):
    """The keys of config.json that a model is made of; a value that it does not compute is an error."""

    model_config = ConfigDict(extra="ignore")

    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Annotated[int, Field(strict=True, gt=0, le=1000)]
    num_attention_heads: Positive
    initializer_range: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] = 0.02


Checked = TypeVar("Checked", bound=HFConfig)


def check_config(kind: type[Checked], hf: Mapping[str, Any]) -> Checked:
    """UserError that lists every key of config.json that cannot be used."""
    try:
        return kind.model_validate(hf)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            field = ".".join(map(str, problem["loc"]))
            found = f", found {problem['input']!r}" if field and problem["type"] != "missing" else ""
            problems.append(f"{field}{': ' if field else ''}{problem['msg'].removeprefix('Value error, ')}{found}")
        raise UserError("config.json cannot be used:\n" + format_problems(problems)) from error
