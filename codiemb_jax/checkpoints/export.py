"""Parameters + blueprint -> a Hugging Face folder that sentence-transformers loads without remote code."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast

from codiemb_jax.checkpoints.blueprint import Blueprint, write_files
from codiemb_jax.checkpoints.families import family_of
from codiemb_jax.checkpoints.families.family import Family
from codiemb_jax.checkpoints.safetensors import NUMPY_TYPES, write_weights
from codiemb_jax.checkpoints.sentence_transformers import write_modules
from codiemb_jax.config import PromptSettings
from codiemb_jax.errors import UserError
from codiemb_jax.files import new_folder, write_json
from codiemb_jax.models.build import Params
from codiemb_jax.models.decoder import Decoder
from codiemb_jax.text.prompts import PromptTokenizer, prompt_texts
from codiemb_jax.text.sentence import SentencePrompts

_LONG = (
    "The committee met in the spring to settle the budget of the coming year, heard the reports of the three working "
    "groups on roads, schools and water, and put off the vote on the new bridge until the engineers had answered the "
    "questions that the neighbouring towns had raised about its height, its cost and the traffic it would bring. "
)
PROBES = (
    "what is the capital of France",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "How do I reset my password?",
    "2024 年全球平均气温再创新高",
    "怎样更换自行车的内胎？",
    "“Quoted”, (bracketed) and C++20",
    "Überraschend schöne Straßen führen über den Pass",
    _LONG.strip(),
    (8 * _LONG).strip(),
)
"""Texts over which an export is tried; the longest has some 500 tokens, for short ones hide errors of RoPE."""


def check_exportable(blueprint: Blueprint) -> None:
    """Checks that an export would encode as the model does.

    Raises:
      UserError: sentence-transformers would make other vectors than ours.
    """
    if blueprint.prompt is None or blueprint.prompt.include_in_pooling:
        return
    begins = [f"prompt.{name}" for name in ("begin", "query", "passage") if getattr(blueprint.prompt, name)]
    if blueprint.encoding["pooling"] == "weighted_mean" and begins:
        raise UserError(
            "model.pooling: weighted_mean cannot be exported with prompts that it leaves out: sentence-transformers "
            "counts the weights 1, 2, 3 … from the prompt's first token, we from the content's; set "
            f"{' and '.join(begins)} to nothing, or prompt.include_in_pooling to true, or export to false"
        )


def write_export(
    folder: Path, params: Params, passthrough: Mapping[str, Any], blueprint: Blueprint, *, stock: bool
) -> None:
    """Writes a new folder, completely or not at all.

    stock: as the architecture that transformers itself knows (utu becomes Qwen3); else config.json and the
    model's own code files stay as they came.

    Raises:
      UserError: the folder exists or cannot be written, or the model cannot be exported.
    """
    check_exportable(blueprint)
    with new_folder(folder) as made:
        made.mkdir()
        _write_folder(made, params, passthrough, blueprint, stock)


def _write_folder(
    folder: Path, params: Params, passthrough: Mapping[str, Any], blueprint: Blueprint, stock: bool
) -> None:
    family = family_of(blueprint.config)
    write_weights(folder, params, passthrough, family.weights, blueprint.prefix, blueprint.dtypes)
    config = blueprint.config
    if stock:  # what transformers itself knows needs no code
        config = {name: value for name, value in family.stock(config).items() if name != "auto_map"}
    write_json(folder / "config.json", _described(config, blueprint, family))
    if not stock:
        write_files(folder, blueprint.code)
    sentence = sentence_prompts(blueprint)
    write_files(folder, blueprint.files)
    if blueprint.prompt is not None:
        _change_tokenizer(folder, blueprint, blueprint.prompt)
    dim = int(params["embedding"].shape[-1])
    pooling, normalize = (blueprint.encoding[name] for name in ("pooling", "normalize"))
    projection = params.get("projection")
    dim = write_modules(folder, dim, pooling, normalize, projection, sentence.include_prompt)
    _write_sentence_transformers(folder, blueprint, sentence)
    (folder / "README.md").write_text(_card(blueprint, family, sentence, dim), encoding="utf-8")


def sentence_prompts(blueprint: Blueprint) -> SentencePrompts:
    """How an export makes tokens of texts, in sentence-transformers' words."""
    if blueprint.sentence is not None:
        return blueprint.sentence
    assert blueprint.prompt is not None
    # Of all tokens cls and last_token take one, and a weighted mean is exported with the prompt or without any.
    include = blueprint.prompt.include_in_pooling or blueprint.encoding["pooling"] != "mean"
    return SentencePrompts(prompts=prompt_texts(blueprint.prompt), include_prompt=include)


def _described(config: dict[str, Any], blueprint: Blueprint, family: Family) -> dict[str, Any]:
    """config.json as it fits the weights that are written, and a decoder's direction of attention in both spellings:
    `is_causal` for transformers, the other for vLLM and TEI.

    The weights' type is that of most of them; it stands under the name that the config came with.
    """
    most, _ = Counter(blueprint.dtypes.values()).most_common(1)[0]
    spelling = "dtype" if "dtype" in config else "torch_dtype"
    bidirectional = blueprint.encoding["attention"] == "bidirectional"
    config = {name: value for name, value in config.items() if name != "quantization_config"}  # weights are plain
    if family.model is Decoder:
        config |= {"is_causal": not bidirectional, "use_bidirectional_attention": bidirectional}
    return config | {spelling: NUMPY_TYPES[most].name}


def _change_tokenizer(folder: Path, blueprint: Blueprint, prompt: PromptSettings) -> None:
    """Changes the tokenizer in `folder` so that it adds the end token, and nothing else, by itself."""
    tokenizer = blueprint.tokenizer()
    end_ids = tokenizer(prompt.end, add_special_tokens=False)["input_ids"]
    backend = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    backend |= {"post_processor": _appends(tokenizer, end_ids), "truncation": None, "padding": None}
    if not prompt.include_in_pooling and _blank_merges(tokenizer, prompt):
        # sentence-transformers takes as many tokens for the prompt as the prompt alone has.  The blank at its end
        # is a token there, but part of the text's first word in front of a text.
        strip = {"type": "Strip", "strip_left": False, "strip_right": True}
        others = [backend["normalizer"]] if backend.get("normalizer") else []
        backend["normalizer"] = {"type": "Sequence", "normalizers": [strip, *others]}
    write_json(folder / "tokenizer.json", backend)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in ("auto_map", "add_bos_token", "add_eos_token", "backend"):  # tokenizer.json says it all
        config.pop(name, None)
    write_json(
        path,
        {**config, "tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right", "truncation_side": "right"}
        | {"model_max_length": blueprint.max_tokens},
    )


def _appends(tokenizer: PreTrainedTokenizerFast, end_ids: Sequence[int]) -> dict[str, Any]:
    """A post-processor (tokenizers' TemplateProcessing) that puts the end tokens behind a text."""
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


def _blank_merges(tokenizer: PreTrainedTokenizerFast, prompt: PromptSettings) -> bool:
    """Whether the space at the query prompt's end becomes part of the next word, for most probe texts."""
    query = prompt_texts(prompt)["query"]
    texts = PromptTokenizer(tokenizer, prompt).tokenize(PROBES, query, 10**6)
    alone = len(tokenizer(query, add_special_tokens=False)["input_ids"])
    return sum(text.content < alone for text in texts) > len(texts) / 2


def _write_sentence_transformers(folder: Path, blueprint: Blueprint, sentence: SentencePrompts) -> None:
    limits = {"max_seq_length": blueprint.max_tokens, "do_lower_case": sentence.do_lower_case}
    write_json(folder / "sentence_bert_config.json", limits)
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "__version__": {"transformers": transformers.__version__},
            "prompts": sentence.prompts,
            "default_prompt_name": sentence.default_prompt_name,
            "similarity_fn_name": "cosine",
            "model_type": "SentenceTransformer",
        },
    )


DESCRIPTIONS = {
    "mean": "the mean over the text's tokens",
    "weighted_mean": "the mean over the text's tokens, weighted 1, 2, 3 …",
    "cls": "the first token's",
    "last_token": "the last token's",
}


def _card(blueprint: Blueprint, family: Family, sentence: SentencePrompts, dim: int) -> str:
    pooling = DESCRIPTIONS[blueprint.encoding["pooling"]] + (
        "" if sentence.include_prompt else ", the prompt's left out"
    )
    strip = 'Training strips tabs, newlines, spaces and colons from both ends of a text: `text.strip("\\t\\n :")`.\n'
    needs = "Needs transformers 5.2 or newer: older ones ignore `is_causal` in config.json.\n"
    length = "unit " if blueprint.encoding["normalize"] else ""
    rows = "\n".join(
        f"| {name} | `{text}` |" if text else f"| {name} | none |" for name, text in sentence.prompts.items()
    )
    made_by = f"codiemb_jax {version('codiemb-jax')} ([CoDiEmb](https://arxiv.org/abs/2508.11442))"
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, sentence-similarity, codiemb]
---

# Text embedding model

Written by {made_by}. It maps a text of up to
{blueprint.max_tokens} tokens to a {length}vector of {dim} dimensions; compare vectors by their cosine.
Attention is {blueprint.encoding["attention"]}; a vector is {pooling}.
{strip if blueprint.prompt is not None else ""}{needs if family.model is Decoder else ""}
```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER")
queries = model.encode_query(["how do plants make sugar"])
documents = model.encode_document(["Photosynthesis turns light, water and carbon dioxide into sugar."])
print(model.similarity(queries, documents))
```

| prompt | text |
|---|---|
{rows}
"""
