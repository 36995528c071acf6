"""The definition of a model family, and the validation of config.json."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from codiemb_jax.config import PositiveInt
from codiemb_jax.errors import UserError, format_problems
from codiemb_jax.models.decoder import Decoder
from codiemb_jax.models.encoder import Encoder


class Weight(NamedTuple):
    """A row of a family's table: the path of a weight in the parameters and its name in the checkpoint.

    `{layer}` in the name is the index along the first axis of the stacked weight.
    """

    path: str
    name: str
    transpose: bool
    """PyTorch stores [out, in], this project [in, out]."""


@dataclass(frozen=True)
class Family:
    model_type: str
    model: type[Decoder] | type[Encoder]
    read_config: Callable[[Mapping[str, Any]], Any]
    """Returns the config of `model`, given config.json."""
    prefix: str
    """Optional prefix of the weight names, absent in checkpoints of the base model."""
    weights: tuple[Weight, ...]
    passthrough: tuple[str, ...]
    """Names (with `*` as a wildcard) of weights that a checkpoint may contain but the model does not use. They are
    passed through unchanged."""
    stock: Callable[[dict[str, Any]], dict[str, Any]]
    """Returns config.json for the equivalent architecture in transformers, given config.json."""
    causal: bool = False
    """Whether attention in transformers is causal by default."""


class HFConfig(BaseModel):
    """The keys of config.json that a model uses. Unsupported values are errors."""

    model_config = ConfigDict(extra="ignore")

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: Annotated[int, Field(strict=True, gt=0, le=1000)]
    num_attention_heads: PositiveInt
    initializer_range: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] = 0.02


Checked = TypeVar("Checked", bound=HFConfig)


def check_config(kind: type[Checked], hf: Mapping[str, Any]) -> Checked:
    """Validates config.json.

    Raises:
      UserError: If any keys are invalid; the message lists all of them.
    """
    try:
        return kind.model_validate(hf)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            field = ".".join(map(str, problem["loc"]))
            found = f", found {problem['input']!r}" if field and problem["type"] != "missing" else ""
            problems.append(f"{field}{': ' if field else ''}{problem['msg'].removeprefix('Value error, ')}{found}")
        raise UserError("invalid config.json:\n" + format_problems(problems)) from error
