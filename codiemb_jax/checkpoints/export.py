"""Writes a Hugging Face folder that sentence-transformers loads without remote code."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast

from codiemb_jax.checkpoints.blueprint import Blueprint, write_files
from codiemb_jax.checkpoints.families import get_family
from codiemb_jax.checkpoints.families.family import Family
from codiemb_jax.checkpoints.safetensors import NUMPY_DTYPES, write_weights
from codiemb_jax.checkpoints.sentence_transformers import write_modules
from codiemb_jax.config import PromptSettings
from codiemb_jax.errors import UserError
from codiemb_jax.files import new_folder, write_json
from codiemb_jax.models.build import Params
from codiemb_jax.models.decoder import Decoder
from codiemb_jax.text.prompts import PromptTokenizer, prompt_texts, query_prompt
from codiemb_jax.text.sentence import SentencePrompts
from codiemb_jax.version import __version__

_LONG_TEXT = (
    "The committee met in the spring to settle the budget of the coming year, heard the reports of the three working "
    "groups on roads, schools and water, and put off the vote on the new bridge until the engineers had answered the "
    "questions that the neighbouring towns had raised about its height, its cost and the traffic it would bring. "
)
PROBE_TEXTS = (
    "what is the capital of France",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "How do I reset my password?",
    "2024 年全球平均气温再创新高",
    "怎样更换自行车的内胎？",
    "“Quoted”, (bracketed) and C++20",
    "Überraschend schöne Straßen führen über den Pass",
    _LONG_TEXT.strip(),
    (8 * _LONG_TEXT).strip(),
)
"""Texts for testing an export. The longest has about 500 tokens because short texts hide RoPE errors."""


def check_exportable(blueprint: Blueprint) -> None:
    """Checks that the model can be exported without changing its embeddings.

    Raises:
      UserError: If sentence-transformers would compute other embeddings.
    """
    if blueprint.prompt is None or blueprint.prompt.include_in_pooling:
        return
    prefixes = [f"prompt.{name}" for name in ("begin", "query", "passage") if getattr(blueprint.prompt, name)]
    if blueprint.encoding["pooling"] == "weighted_mean" and prefixes:
        raise UserError(
            "model.pooling: weighted_mean cannot be exported with prompts excluded from pooling: sentence-transformers "
            "counts the weights 1, 2, 3 … from the start of the prompt, this project from the start of the text; set "
            f"{' and '.join(prefixes)} to '', prompt.include_in_pooling to true, or export to false"
        )


def write_export(
    folder: Path,
    params: Params,
    passthrough: Mapping[str, Any],
    blueprint: Blueprint,
    *,
    stock: bool,
    instructions: Mapping[str, str] | None = None,
) -> None:
    """Writes a new folder, completely or not at all.

    Args:
      folder: The folder to create.
      params: The parameters.
      passthrough: Weights that the model does not use, by name.
      blueprint: Everything else.
      stock: Whether to use an equivalent architecture that transformers supports natively (utu becomes Qwen3).
        Otherwise the architecture in config.json and the Python files of the original folder are kept.
      instructions: Task instructions by name. The folder gets the query prompt with each, under this name.

    Raises:
      UserError: If the folder exists or cannot be written, or the model cannot be exported.
    """
    check_exportable(blueprint)
    sentence = sentence_prompts(blueprint)
    if instructions:
        sentence = _with_prompts(sentence, blueprint, instructions)
    with new_folder(folder) as new:
        new.mkdir()
        _write_folder(new, params, passthrough, blueprint, stock, sentence)


def _with_prompts(sentence: SentencePrompts, blueprint: Blueprint, instructions: Mapping[str, str]) -> SentencePrompts:
    """Adds the query prompts with these task instructions. See `write_export`."""
    if blueprint.prompt is None or not blueprint.prompt.query:
        raise UserError("the model's prompts have no placeholder for the instructions of tasks")
    prompts = {name: query_prompt(blueprint.prompt, instruction) for name, instruction in instructions.items()}
    return sentence.model_copy(update={"prompts": sentence.prompts | prompts})


def _write_folder(
    folder: Path,
    params: Params,
    passthrough: Mapping[str, Any],
    blueprint: Blueprint,
    stock: bool,
    sentence: SentencePrompts,
) -> None:
    family = get_family(blueprint.config)
    write_weights(folder, params, passthrough, family.weights, blueprint.prefix, blueprint.dtypes)
    config = blueprint.config
    if stock:  # no remote code needed
        config = {name: value for name, value in family.stock(config).items() if name != "auto_map"}
    write_json(folder / "config.json", _config_for_export(config, blueprint, family))
    if not stock:
        write_files(folder, blueprint.code)
    write_files(folder, blueprint.files)
    if blueprint.prompt is not None:
        _adapt_tokenizer(folder, blueprint, blueprint.prompt)
    dim = int(params["embedding"].shape[-1])
    pooling, normalize = (blueprint.encoding[name] for name in ("pooling", "normalize"))
    projection = params.get("projection")
    dim = write_modules(folder, dim, pooling, normalize, projection, sentence.include_prompt)
    _write_sentence_transformers(folder, blueprint, sentence)
    (folder / "README.md").write_text(_model_card(blueprint, family, sentence, dim), encoding="utf-8")


def sentence_prompts(blueprint: Blueprint) -> SentencePrompts:
    """Returns the prompts of an export, as sentence-transformers represents them."""
    if blueprint.sentence is not None:
        return blueprint.sentence
    assert blueprint.prompt is not None
    # cls and last_token select one of all tokens; a weighted mean is exported only if no prompt is excluded.
    include = blueprint.prompt.include_in_pooling or blueprint.encoding["pooling"] != "mean"
    return SentencePrompts(
        prompts=prompt_texts(blueprint.prompt),
        include_prompt=include,
        query_template=blueprint.prompt.query,
        begin=blueprint.prompt.begin,
    )


def _config_for_export(config: dict[str, Any], blueprint: Blueprint, family: Family) -> dict[str, Any]:
    """Returns config.json with the dtype of most weights and the attention of a decoder.

    The attention has two keys: `is_causal` for transformers, `use_bidirectional_attention` for vLLM and TEI.
    """
    most_common, _ = Counter(blueprint.dtypes.values()).most_common(1)[0]
    dtype_key = "dtype" if "dtype" in config else "torch_dtype"
    bidirectional = blueprint.encoding["attention"] == "bidirectional"
    # The weights are not quantized.
    config = {name: value for name, value in config.items() if name != "quantization_config"}
    if family.model is Decoder:
        config |= {"is_causal": not bidirectional, "use_bidirectional_attention": bidirectional}
    return config | {dtype_key: NUMPY_DTYPES[most_common].name}


def _adapt_tokenizer(folder: Path, blueprint: Blueprint, prompt: PromptSettings) -> None:
    """Changes the tokenizer in `folder` to append the end tokens and nothing else."""
    tokenizer = blueprint.tokenizer()
    end_ids = tokenizer(prompt.end, add_special_tokens=False)["input_ids"]
    backend = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    backend |= {"post_processor": _append_end_tokens(tokenizer, end_ids), "truncation": None, "padding": None}
    if not prompt.include_in_pooling and _merges_prompt_space(tokenizer, prompt):
        # sentence-transformers counts the tokens of the prompt alone. There, the space at the end is a token of its
        # own; in front of a text, it is merged with the first word.
        strip = {"type": "Strip", "strip_left": False, "strip_right": True}
        others = [backend["normalizer"]] if backend.get("normalizer") else []
        backend["normalizer"] = {"type": "Sequence", "normalizers": [strip, *others]}
    write_json(folder / "tokenizer.json", backend)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in ("auto_map", "add_bos_token", "add_eos_token", "backend"):  # covered by tokenizer.json
        config.pop(name, None)
    write_json(
        path,
        {**config, "tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right", "truncation_side": "right"}
        | {"model_max_length": blueprint.max_tokens},
    )


def _append_end_tokens(tokenizer: PreTrainedTokenizerFast, end_ids: Sequence[int]) -> dict[str, Any]:
    """Returns a post-processor for tokenizer.json that appends the end tokens."""
    names = {tokenizer.convert_ids_to_tokens(i): i for i in end_ids}
    end = [{"SpecialToken": {"id": tokenizer.convert_ids_to_tokens(i), "type_id": 0}} for i in end_ids]
    first, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    special = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in names.items()}
    return {
        "type": "TemplateProcessing",
        "single": [first, *end],
        "pair": [first, *end, second, *end],
        "special_tokens": special,
    }


def _merges_prompt_space(tokenizer: PreTrainedTokenizerFast, prompt: PromptSettings) -> bool:
    """Whether the tokenizer merges the space at the end of the query prompt with most of the probe texts."""
    query = prompt_texts(prompt)["query"]
    texts = PromptTokenizer(tokenizer, prompt).tokenize(PROBE_TEXTS, query, 10**6)
    alone = len(tokenizer(query, add_special_tokens=False)["input_ids"])
    return sum(text.content_start < alone for text in texts) > len(texts) / 2


def _write_sentence_transformers(folder: Path, blueprint: Blueprint, sentence: SentencePrompts) -> None:
    limits = {"max_seq_length": blueprint.max_tokens, "do_lower_case": sentence.do_lower_case}
    write_json(folder / "sentence_bert_config.json", limits)
    # For evaluation with the instruction of each query. sentence-transformers ignores these keys.
    template = sentence.model_dump(include={"query_template", "begin"}) if sentence.query_template is not None else {}
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "__version__": {"transformers": transformers.__version__},
            "prompts": sentence.prompts,
            "default_prompt_name": sentence.default_prompt_name,
            "similarity_fn_name": "cosine",
            "model_type": "SentenceTransformer",
            **template,
        },
    )


POOLING_DESCRIPTIONS = {
    "mean": "the mean of the token states",
    "weighted_mean": "the mean of the token states, weighted 1, 2, 3 …",
    "cls": "the state of the first token",
    "last_token": "the state of the last token",
}


def _model_card(blueprint: Blueprint, family: Family, sentence: SentencePrompts, dim: int) -> str:
    pooling = POOLING_DESCRIPTIONS[blueprint.encoding["pooling"]] + (
        "" if sentence.include_prompt else ", without the prompt"
    )
    strip = 'Texts were stripped of tabs, newlines, spaces and colons in training: `text.strip("\\t\\n :")`.\n'
    needs = "Requires transformers 5.2 or newer; older versions ignore `is_causal` in config.json.\n"
    is_float32 = set(blueprint.dtypes.values()) == {"F32"}
    dtype = "" if is_float32 else ', model_kwargs={"dtype": "float32"}'
    normalized = "unit " if blueprint.encoding["normalize"] else ""
    rows = "\n".join(
        f"| {name} | `{text}` |" if text else f"| {name} | none |" for name, text in sentence.prompts.items()
    )
    exported_by = f"codiemb_jax {__version__} ([CoDiEmb](https://arxiv.org/abs/2508.11442))"
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, sentence-similarity, codiemb]
---

# Text embedding model

Exported by {exported_by}. It maps texts of up to
{blueprint.max_tokens} tokens to {normalized}vectors of {dim} dimensions. Compare embeddings by cosine similarity.
Attention is {blueprint.encoding["attention"]}; an embedding is {pooling}.
{strip if blueprint.prompt is not None else ""}{needs if family.model is Decoder else ""}
```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER"{dtype})
queries = model.encode_query(["how do plants make sugar"])
documents = model.encode_document(["Photosynthesis turns light, water and carbon dioxide into sugar."])
print(model.similarity(queries, documents))
```

| prompt | text |
|---|---|
{rows}
"""
