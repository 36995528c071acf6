"""Tests of settings: defaults, files, flags and error messages."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from codiemb_jax.config import PromptSettings, Settings, TaskSpec
from codiemb_jax.config_file import dump_settings, flags_parser, load_settings
from codiemb_jax.errors import UserError

MINIMAL = """output_dir: runs/name
model:
  path: folder
data:
  ir: [ir.jsonl]
"""

DEFAULTS = """
output_dir: runs/name
seed: 49
model:
  path: folder
  attention: bidirectional
  attention_backend: auto
  pooling: mean
  normalize: true
  projection_dim: null
  dropout: null
  compute_dtype: bfloat16
  param_dtype: float32
  remat: dots
prompt:
  begin: ""
  query: "Instruction: {instruction} Query: "
  passage: ""
  end: ""
  default_instruction: "Given a search query, retrieve passages that answer the question"
  include_in_pooling: false
data:
  ir: [ir.jsonl]
  sts: []
  sampler: dynamic
  max_examples: null
  ir_share: null
  ir_global_batch_size: 224
  sts_global_batch_size: 256
  positives_per_query: 2
  negatives_per_query: 4
  query_max_tokens: 1024
  passage_max_tokens: 1024
  packing: true
  row_tokens: null
evaluation: {ir: [], sts: [], beir: [], every_steps: null, metric: null, keep_best: true, patience: null}
objective:
  ir: info_nce
  sts: codi
  temperature: 0.02
  ir_pool_size: null
  sts_list_size: 32
  list_temperature: 0.05
  pearson_weight: 2.0
  rank_kl_weight: 5.0
  pro_weight: 0.5
  mid_info_nce_weight: 1.0
  mid_info_nce_threshold: 1.0
  mask_duplicates: true
optimizer:
  learning_rate: 4.0e-5
  schedule: linear
  warmup_ratio: 0.03
  warmup_steps: null
  epochs: 4
  max_steps: null
  weight_decay: 0.0
  betas: [0.9, 0.999]
  eps: 1.0e-8
  clip_norm: null
  moments_dtype: null
  offload: false
encode_chunks: 1
mesh: {data: -1, fsdp: 1, tensor: 1}
distributed: {coordinator: null, num_processes: null, process_id: null}
checkpoint: {every_steps: null, every_epochs: 1, keep: 3}
tracking: {tensorboard: true, wandb: {project: null, mode: online}}
non_finite: stop
non_finite_skips: 10
export: true
push_to_hub: null
"""


@pytest.fixture
def load(tmp_path):
    """Loads settings from the text of a file and flags."""

    def load(text: str, *flags: str) -> Settings:
        (tmp_path / "settings.yaml").write_text(text, encoding="utf-8")
        return load_settings(tmp_path / "settings.yaml", flags)

    return load


@pytest.fixture
def error_lines(load, tmp_path):
    """Loads invalid settings and returns the lines of the error message, with the path of the file as FILE."""

    def error_lines(text: str, *flags: str) -> list[str]:
        with pytest.raises(UserError) as error:
            load(text, *flags)
        return str(error.value).replace(str(tmp_path / "settings.yaml"), "FILE").splitlines()

    return error_lines


def test_defaults(load):
    assert load(MINIMAL).model_dump(mode="json") == yaml.safe_load(DEFAULTS)


def test_settings_from_file(load):
    settings = load(
        MINIMAL
        + "  sts: [a, b]\n  sts_global_batch_size: 64\nseed: 7\noptimizer:\n  learning_rate: 1e-5\n  betas: [0.8, 0.95]"
        "\n  clip_norm: 1\nobjective: {sts_list_size: null}\nexport: false\ncheckpoint: {every_epochs: null}\n"
    )
    assert settings.data.sts == [Path("a"), Path("b")]
    assert settings.data.sts_global_batch_size == 64
    assert settings.seed == 7
    assert settings.optimizer.learning_rate == 1e-5  # a string in YAML 1.1
    assert settings.optimizer.betas == (0.8, 0.95)
    assert settings.optimizer.clip_norm == 1.0
    assert settings.objective.sts_list_size is None
    assert settings.checkpoint.every_epochs is None
    assert settings.export is False
    assert settings.optimizer.epochs == 4


def test_dumped_settings_load_unchanged(load):
    settings = load(MINIMAL, "--optimizer.betas", "[0.8, 0.9]", "--optimizer.eps", "1e-6", "--prompt.query", "")
    assert load(dump_settings(settings)) == settings


@pytest.mark.parametrize("text", ["2e-5", "1e5", "+1.5E3", "010", "2:8", "0x10", "1.5", "null", "true", "2024-01-01"])
def test_dumped_texts_that_look_like_other_values_load_unchanged(text, load):
    settings = load(MINIMAL).model_copy(update={"prompt": PromptSettings(default_instruction=text)})
    assert load(dump_settings(settings)) == settings


def test_flags_override_single_settings_of_the_file(load):
    text = MINIMAL + "seed: 7\noptimizer:\n  learning_rate: 1.0e-3\n  epochs: 9\n"
    settings = load(
        text, "--seed", "8", "--optimizer.learning_rate=2e-5", "--model.path", "other", "--data.ir", '["x", "y"]',
        "--mesh.data", "-1", "--export", "false", "--prompt.passage", "Passage: ",
    )  # fmt: skip
    assert settings.seed == 8
    assert settings.optimizer.learning_rate == 2e-5
    assert settings.optimizer.epochs == 9
    assert settings.model.path == "other"
    assert settings.data.ir == [Path("x"), Path("y")]
    assert settings.mesh.data == -1
    assert settings.export is False
    assert settings.prompt.passage == "Passage: "
    assert settings.output_dir == Path("runs/name")


def test_flags_add_settings_missing_from_the_file(load):
    settings = load("seed: 3\n", "--output_dir", "o", "--model.path", "m", "--data.sts", "s")
    assert (settings.seed, settings.output_dir, settings.model.path) == (3, Path("o"), "m")
    assert (settings.data.ir, settings.data.sts) == ([], [Path("s")])


def test_list_flag_replaces_list_of_the_file(load):
    for flags in (["--data.ir", "x", "--data.ir", "y"], ["--data.ir", "x,y"], ["--data.ir", '["x","y"]']):
        assert load(MINIMAL, *flags).data.ir == [Path("x"), Path("y")]


def test_null_flag_unsets_setting(load):
    text = MINIMAL + "optimizer: {clip_norm: 1.0, max_steps: 5}\n"
    settings = load(
        text, "--objective.sts_list_size", "null", "--checkpoint.every_epochs=null", "--optimizer.clip_norm", "null"
    )
    assert settings.objective.sts_list_size is None
    assert settings.checkpoint.every_epochs is None
    assert settings.optimizer.clip_norm is None
    assert settings.optimizer.max_steps == 5


def test_environment_variables_are_ignored(load, monkeypatch):
    expected = load(MINIMAL)
    for name, value in {
        "SEED": "7", "seed": "7", "OUTPUT_DIR": "elsewhere", "MODEL": '{"path": "q"}', "MODEL__PATH": "q",
        "OPTIMIZER": '{"epochs": 9}', "DATA": "not JSON", "EXPORT": "false",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert load(MINIMAL) == expected


def test_all_problems_are_reported_with_file_line_and_field(error_lines):
    text = """model:
  pth: folder
  remat: some
seed: -1
encode_chunks: 0
data:
  ir: [ir.jsonl, [2]]
  ir_global_batch_size: many
optimizer:
  betas: [0.9, 1.0]
  learning_rate: .nan
  epochs: 1.5
  warmup_ratio: 1.01
objective:
  temperature: 0
mesh: {fsdp: 0, rows: 1}
"""
    header, *problems = error_lines(text)
    assert header == "invalid settings:"
    expected = {
        "FILE: output_dir: missing (required)": "",
        "FILE: model.path: missing (required)": "",
        "FILE:2: model.pth: unknown setting": "",
        "FILE:3: model.remat: ": "'none', 'dots' or 'full', found 'some'",
        "FILE:4: seed: ": "greater than or equal to 0, found -1",
        "FILE:5: encode_chunks: ": "greater than 0, found 0",
        "FILE:7: data.ir.1: ": "found [2]",
        "FILE:8: data.ir_global_batch_size: ": "valid integer, found 'many'",
        "FILE:10: optimizer.betas.1: ": "less than 1, found 1.0",
        "FILE:11: optimizer.learning_rate: ": "finite number, found nan",
        "FILE:12: optimizer.epochs: ": "found 1.5",
        "FILE:13: optimizer.warmup_ratio: ": "less than or equal to 1, found 1.01",
        "FILE:15: objective.temperature: ": "greater than 0, found 0",
        "FILE:16: mesh.fsdp: ": "greater than 0, found 0",
        "FILE:16: mesh.rows: unknown setting": "",
    }
    for start, end in expected.items():
        assert [p for p in problems if p.startswith("  " + start) and p.endswith(end)], start
    assert len(problems) == len(expected)


@pytest.mark.parametrize("name", ["chunks_encoded", "cli_args", "_cli_parse_args", "_env_file", "model_config", "1"])
def test_unknown_top_level_setting_raises_user_error(name, error_lines):
    assert error_lines(MINIMAL + f"{name}: 2\nOther: 3\n")[1:] == [
        f"  FILE:6: {name}: unknown setting",
        "  FILE:7: Other: unknown setting",
    ]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("encode_chunk", "encode_chunks"),
        ("optimizer.epoch", "optimizer.epochs"),
        ("epochs", "optimizer.epochs"),
        ("evaluation.stss", "evaluation.sts"),
    ],
)
def test_similar_setting_is_suggested(name, meant, error_lines):
    *section, key = name.split(".")
    text = f"{section[0]}: {{{key}: 2}}\n" if section else f"{key}: 2\n"
    assert error_lines(MINIMAL + text)[1:] == [f"  FILE:6: {name}: unknown setting; did you mean {meant}?"]
    assert error_lines(MINIMAL, f"--{name}", "2") == [f"unrecognized arguments: --{name} 2; did you mean {meant}?"]


def test_duplicate_key_raises_user_error(error_lines):
    text = MINIMAL + "seed: 1\noptimizer:\n  epochs: 1\n  epochs: 1\nseed: 2\n"
    assert error_lines(text)[1:] == [
        "  FILE:9: optimizer.epochs: duplicate key",
        "  FILE:10: seed: duplicate key",
    ]


def test_repeated_flag_of_scalar_raises_user_error(error_lines):
    assert error_lines(MINIMAL, "--seed", "1", "--seed=2", "--optimizer.betas", "0,0", "--optimizer.betas", "0,0") == [
        "invalid settings:",
        "  --seed: given 2 times",
        "  --optimizer.betas: given 2 times",
    ]


def test_repeated_flags_of_list_accumulate(load):
    flags = ["--data.ir", "a,b", "--data.ir", '["c", "d"]', "--data.ir=e", "--data.ir", "[f]"]
    assert load(MINIMAL, *flags).data.ir == [Path(name) for name in "abcdef"]


def test_flag_changes_only_one_use_of_an_anchor(load):
    text = MINIMAL.replace("data:", "data: &data") + "evaluation: *data\n"
    settings = load(text, "--data.ir", "other", "--evaluation.sts", "held_out")
    assert (settings.data.ir, settings.data.sts) == ([Path("other")], [])
    assert (settings.evaluation.ir, settings.evaluation.sts) == ([Path("ir.jsonl")], [Path("held_out")])


def test_invalid_flag_is_named_in_the_error(error_lines):
    assert error_lines(MINIMAL + "seed: 1\n", "--seed", "abc", "--data.ir_global_batch_size=0") == [
        "invalid settings:",
        "  --seed: Input should be a valid integer, found 'abc'",
        "  --data.ir_global_batch_size: Input should be greater than 0, found 0",
    ]


def test_null_is_not_a_list_of_paths(load, error_lines):
    both = MINIMAL + "  sts: [sts.jsonl]\n"
    assert error_lines(both, "--data.sts", "null")[1:] == [
        "  --data.sts: expected a list of paths; use [] for none, found None"
    ]
    assert load(both, "--data.sts", "[]").data.sts == []


def test_single_path_becomes_a_list(load):
    settings = load(MINIMAL.replace("[ir.jsonl]", "ir.jsonl") + "  sts: a,b\nevaluation: {sts: held out}\n")
    assert settings.data.ir == [Path("ir.jsonl")]
    assert settings.data.sts == [Path("a,b")]  # commas separate items only in flags
    assert settings.evaluation.sts == [Path("held out")]


def test_home_directory_is_expanded(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    settings = load(MINIMAL.replace("runs/name", "~/run").replace("folder", "~/model"), "--data.ir", "~,~/b")
    assert settings.output_dir == Path("/home/someone/run")
    assert settings.model.path == "/home/someone/model"
    assert settings.data.ir == [Path("/home/someone"), Path("/home/someone/b")]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("+2.e-3", 2e-3),
        (".5e-3", 5e-4),
        (".5e3", 500),
        ("1.5e3", 1500),
        ("2", 2),
        ("0", 0),
        ("0x10", 16),
        ("1_000", 1000),
    ],
)
def test_number_formats(text, value, load):
    assert load(MINIMAL + f"optimizer: {{learning_rate: {text}}}\n").optimizer.learning_rate == value
    assert load(MINIMAL, "--optimizer.learning_rate", text).optimizer.learning_rate == value


@pytest.mark.parametrize("text", ["-1e-3", "-0.001", "-.001", "-1.E-3"])
def test_negative_number_as_a_flag(text, load):
    assert load(MINIMAL, "--objective.mid_info_nce_threshold", text).objective.mid_info_nce_threshold == -1e-3


WRONG_TYPES = {
    ("seed", "true"): "Input should be a valid integer, found True",
    ("seed", "'1'"): "Input should be a valid integer, found '1'",
    ("seed", "010"): "Input should be a valid integer, found '010'",  # 8 in YAML 1.1
    ("data.row_tokens", "2:8"): "Input should be a valid integer, found '2:8'",  # 128 in YAML 1.1
    ("optimizer.learning_rate", "1:30.5"): "Input should be a valid number, found '1:30.5'",
    ("seed", "1.0"): "Input should be a valid integer, found 1.0",
    ("encode_chunks", "1e3"): "Input should be a valid integer, found 1000.0",
    ("data.max_examples", "true"): "Input should be a valid integer, found True",
    ("data.negatives_per_query", "false"): "Input should be a valid integer, found False",
    ("optimizer.warmup_steps", "'2'"): "Input should be a valid integer, found '2'",
    ("mesh.data", "true"): "Input should be a valid integer, found True",
    ("model.projection_dim", "'8'"): "Input should be a valid integer, found '8'",
    ("optimizer.learning_rate", "true"): "Input should be a valid number, found True",
    ("optimizer.learning_rate", "'1e-5'"): "Input should be a valid number, found '1e-5'",
    ("optimizer.clip_norm", "false"): "Input should be a valid number, found False",
    ("optimizer.warmup_ratio", "'0.5'"): "Input should be a valid number, found '0.5'",
    ("objective.temperature", "true"): "Input should be a valid number, found True",
    ("objective.mid_info_nce_threshold", "true"): "Input should be a valid number, found True",
    ("data.packing", "'true'"): "Input should be a valid boolean, found 'true'",
    ("data.row_tokens", "1.5"): "Input should be a valid integer, found 1.5",
    ("data.ir_share", "'0.5'"): "Input should be a valid number, found '0.5'",
    ("model.dropout", "false"): "Input should be a valid number, found False",
    ("export", "1"): "Input should be a valid boolean, found 1",
    ("model.normalize", "'true'"): "Input should be a valid boolean, found 'true'",
    ("prompt.include_in_pooling", "0"): "Input should be a valid boolean, found 0",
}


def with_setting(name: str, value: str) -> tuple[str, int]:
    """Returns MINIMAL with another setting, and the line number of that setting."""
    section, _, key = name.rpartition(".")
    if section == "data":
        return MINIMAL + f"  {key}: {value}\n", 6
    if section == "model":
        return MINIMAL.replace("data:\n", f"  {key}: {value}\ndata:\n"), 4
    return (MINIMAL + f"{section}:\n  {key}: {value}\n", 7) if section else (MINIMAL + f"{key}: {value}\n", 6)


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES)
def test_value_of_wrong_type_raises_user_error(name, value, error_lines):
    text, line = with_setting(name, value)
    assert error_lines(text) == ["invalid settings:", f"  FILE:{line}: {name}: {WRONG_TYPES[name, value]}"]
    assert error_lines(MINIMAL, f"--{name}", value) == ["invalid settings:", f"  --{name}: {WRONG_TYPES[name, value]}"]


def test_invalid_betas_raise_user_error(error_lines):
    problem = "optimizer.betas.0: Input should be a valid number, found True"
    assert error_lines(MINIMAL + "optimizer:\n  betas: [true, 0.9]\n")[1:] == [f"  FILE:7: {problem}"]
    assert error_lines(MINIMAL, "--optimizer.betas", "true,0.9")[1:] == [f"  --{problem}"]
    assert error_lines(MINIMAL, "--optimizer.betas", "0.9")[1:] == ["  --optimizer.betas.1: missing (required)"]


COUNTS = [
    "encode_chunks", "data.max_examples", "data.ir_global_batch_size", "data.sts_global_batch_size",
    "data.query_max_tokens", "data.passage_max_tokens", "data.row_tokens",
    "objective.ir_pool_size", "objective.sts_list_size", "optimizer.warmup_steps", "optimizer.epochs",
    "optimizer.max_steps", "mesh.data", "mesh.fsdp", "mesh.tensor", "checkpoint.every_steps",
    "checkpoint.every_epochs", "checkpoint.keep",
]  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_count_larger_than_int32_raises_user_error(name, load, error_lines):
    problem = f"{name}: Input should be less than or equal to 2147483647, found 2147483648"
    text, line = with_setting(name, "2147483648")
    assert error_lines(text)[1:] == [f"  FILE:{line}: {problem}"]
    assert error_lines(MINIMAL, f"--{name}", "2147483648")[1:] == [f"  --{problem}"]
    section, _, key = name.rpartition(".")
    if name not in ("objective.ir_pool_size", "data.row_tokens"):  # these also depend on other settings
        settings = load(MINIMAL, f"--{name}", "2147483647")
        assert getattr(getattr(settings, section) if section else settings, key) == 2147483647


def test_rows_are_at_most_16_times_as_long_as_the_longest_text(load, error_lines):
    flags = ("--data.query_max_tokens", "10", "--data.passage_max_tokens", "20", "--data.row_tokens")
    assert load(MINIMAL, *flags, "320").data.row_tokens == 320
    assert "row_tokens 321 may be at most 16 times" in error_lines(MINIMAL, *flags, "321")[1]


@pytest.mark.parametrize("name", ["data.positives_per_query", "data.negatives_per_query"])
def test_more_than_1024_passages_per_query_raise_user_error(name, load, error_lines):
    problem = f"{name}: Input should be less than or equal to 1024, found 1025"
    assert error_lines(MINIMAL, f"--{name}", "1025")[1:] == [f"  --{problem}"]
    assert getattr(load(MINIMAL, f"--{name}", "1024").data, name.partition(".")[2]) == 1024


NOT_FLOAT32 = {
    "optimizer.learning_rate": "1e300", "optimizer.weight_decay": "1e300", "optimizer.eps": "1e-300",
    "objective.temperature": "1e-320", "objective.pearson_weight": "1e16",
    "objective.mid_info_nce_threshold": "-1e300", "data.ir_share": "1e-300",
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_FLOAT32)
def test_number_outside_float32_range_raises_user_error(name, error_lines):
    (problem,) = error_lines(MINIMAL, f"--{name}", NOT_FLOAT32[name])[1:]
    assert problem.startswith(f"  --{name}: must be 0 or have an absolute value between 1e-30 and 1e15, found ")


def test_beta_that_rounds_to_1_raises_user_error(load, error_lines):
    (problem,) = error_lines(MINIMAL, "--optimizer.betas", "[0.9, 0.99999999999]")[1:]
    assert problem.startswith("  --optimizer.betas.1: rounds to 1 in float32")
    assert load(MINIMAL, "--optimizer.betas", "[0.9, 0.9999999]").optimizer.betas[1] == 0.9999999


def test_number_with_thousands_of_digits_raises_user_error(error_lines):
    (problem,) = error_lines(MINIMAL + "seed: " + "9" * 4000 + "\n")[1:]
    assert problem.startswith("  FILE:6: seed: Input should be less than 4294967296, found 9999")
    assert len(problem) < 200
    assert error_lines(MINIMAL + "seed: 0x" + "f" * 5000 + "\n")[1:] == [
        "  FILE:6: seed: Input should be less than 4294967296, found a huge number"
    ]
    header, location, *_ = error_lines(MINIMAL + "seed: " + "9" * 5000 + "\n")  # int() rejects it
    assert header.startswith("FILE: not valid YAML: '9999") and header.endswith("cannot be read as int")
    assert location == '  in "FILE", line 6, column 7:'


@pytest.mark.parametrize(
    ("value", "kind"),
    [("!!bool maybe", "bool"), ("!!int ''", "int"), ("!!float ''", "float"), ("!!timestamp x", "timestamp"),
     ("2001-99-99", "timestamp")],
)  # fmt: skip
def test_value_that_does_not_match_its_tag_raises_user_error(value, kind, error_lines):
    header, location, *_ = error_lines(MINIMAL + f"seed: {value}\n")
    assert header.startswith("FILE: not valid YAML: ") and header.endswith(f" cannot be read as {kind}")
    assert location == '  in "FILE", line 6, column 7:'
    assert error_lines(MINIMAL, "--seed", value)[1:] == [f"  --seed: Input should be a valid integer, found {value!r}"]


@pytest.mark.parametrize("text", ["loop: &a [1, *a]", "optimizer: &a {epochs: 1, loop: *a}", "loop: &a {b: [{c: *a}]}"])
def test_recursive_anchor_raises_user_error(text, error_lines):
    (problem,) = error_lines(MINIMAL + text + "\n")[1:]
    name = {"loop: &a [": "loop.1", "optimizer:": "optimizer.loop", "loop: &a {": "loop.b.0.c"}[text[:10]]
    assert problem == f"  FILE:6: {name}: the anchor contains itself"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("shape", ["[{0}, {0}, {0}, {0}]", "{{a: {0}, b: {0}, c: {0}}}", "{{<<: [{0}, {0}, {0}]}}"])
def test_exponentially_expanding_anchors_raise_user_error(shape, error_lines):
    lines = ["0: &a0 {seed: 1}", *(f"{n}: &a{n} " + shape.format(f"*a{n - 1}") for n in range(1, 60))]
    (problem,) = error_lines(MINIMAL + "\n".join(lines) + "\n")[1:]
    assert re.match(r"  FILE:\d+: \d+\..*: more than 10000 values after expanding anchors$", problem)
    assert len(problem) < 300


def test_anchors_and_merge_keys_are_supported(load, error_lines):
    text = MINIMAL + "checkpoint: &c {keep: 2}\noptimizer:\n  <<: {epochs: 3, eps: 1e-6}\n  epochs: 5\n"
    settings = load(text)
    assert (settings.optimizer.epochs, settings.optimizer.eps, settings.checkpoint.keep) == (5, 1e-6, 2)
    assert error_lines(text.replace("epochs: 5", "epochs: 0"))[1:] == [
        "  FILE:9: optimizer.epochs: Input should be greater than 0, found 0"
    ]
    assert error_lines(text.replace("eps: 1e-6", "eps: 0"))[1:] == [
        "  FILE:8: optimizer.eps: Input should be greater than 0, found 0"
    ]


@pytest.mark.parametrize("key", ["? [seed]\n", "? {seed: 1}\n", '"a\\nb"', '"a\\ud800"', '"a\\0"', '""'])
def test_key_that_is_not_a_name_raises_user_error(key, error_lines):
    assert error_lines(MINIMAL + f"optimizer:\n  epochs: 1\n{key}: 3\n")[1:] == [
        "  FILE:8: a key must be the name of a setting"
    ]
    assert error_lines(MINIMAL + f"optimizer: {{{key.strip()} : 3}}\n")[1:] == [
        "  FILE:6: optimizer: a key must be the name of a setting"
    ]


@pytest.mark.parametrize("key", ["1", "1.5", "true", "null", "2001-01-01", "~"])
def test_non_string_key_is_an_unknown_setting(key, error_lines):
    assert error_lines(MINIMAL + f"optimizer:\n  {key}: 3\n")[1:] == [f"  FILE:7: optimizer.{key}: unknown setting"]
    assert error_lines(MINIMAL + f"{key}: 3\n'{key}': 3\n")[1:] == [f"  FILE:7: {key}: duplicate key"]


INVALID_STRINGS = {
    '"a\\0b"': ("a\0b", "must not contain a NUL character, found 'a\\x00b'"),
    '"a\\ud800b"': ("a\ud800b", "must be valid Unicode, without unpaired surrogates, found 'a\\ud800b'"),
}
INVALID_PATHS = INVALID_STRINGS | {
    '""': ("", "a path must be a non-empty string, found ''"),
    "~nosuchuser/x": ("~nosuchuser/x", "no home directory for ~nosuchuser, found '~nosuchuser/x'"),
}


@pytest.mark.parametrize("value", INVALID_PATHS)
@pytest.mark.parametrize(
    ("name", "written", "line"),
    [("output_dir", "runs/name", 1), ("model.path", "folder", 3), ("data.ir.0", "[ir.jsonl]", 5)],
)
def test_invalid_path_raises_user_error(name, written, line, value, error_lines):
    flag_value, problem = INVALID_PATHS[value]
    assert error_lines(MINIMAL.replace(written, value)) == ["invalid settings:", f"  FILE:{line}: {name}: {problem}"]
    flag = name.removesuffix(".0")
    assert error_lines(MINIMAL, f"--{flag}", flag_value) == ["invalid settings:", f"  --{name}: {problem}"]


@pytest.mark.parametrize(("value", "found"), [("3", "3"), ("true", "True"), ("!!binary aGk=", "b'hi'"), ("[]", "[]")])
def test_path_that_is_not_a_string_raises_user_error(value, found, error_lines):
    text = f"output_dir: {value}\nmodel: {{path: {value}}}\ndata: {{ir: [{value}]}}\n"
    assert error_lines(text)[1:] == [
        f"  FILE:{line}: {name}: a path must be a non-empty string, found {found}"
        for line, name in enumerate(["output_dir", "model.path", "data.ir.0"], 1)
    ]


@pytest.mark.parametrize("name", ["begin", "query", "passage", "end", "default_instruction"])
def test_invalid_prompt_raises_user_error(name, load, error_lines):
    for value, (flag_value, problem) in INVALID_STRINGS.items():
        assert error_lines(MINIMAL + f"prompt:\n  {name}: {value}\n")[1:] == [f"  FILE:7: prompt.{name}: {problem}"]
        assert error_lines(MINIMAL, f"--prompt.{name}", flag_value)[1:] == [f"  --prompt.{name}: {problem}"]
    longest = "{instruction}" + "x" * (10_000 - len("{instruction}"))
    assert getattr(load(MINIMAL, f"--prompt.{name}", longest).prompt, name) == longest
    problem = f"prompt.{name}: String should have at most 10000 characters, found '{{instruction}}xxx"
    for line in (
        *error_lines(MINIMAL + f"prompt:\n  {name}: '{longest}x'\n")[1:],
        *error_lines(MINIMAL, f"--prompt.{name}", longest + "x")[1:],
    ):
        assert line.startswith((f"  FILE:7: {problem}", f"  --{problem}"))
        assert len(line) < 200


HUGE_TEXTS = [
    "evaluation: {{ir: ~{}}}", "? {}\n: 1", "optimizer: {{? {} : 1}}", "? {0}\n: 1\n? {0}\n: 1", "seed: *{}",
    "seed: !{} 1", "seed: {}", "prompt: {{begin: {}}}", "objective: {{ir: {}}}", "evaluation: {{ir: [[{}]]}}",
    "mesh: {}",
]  # fmt: skip


@pytest.mark.parametrize("text", HUGE_TEXTS)
def test_error_messages_shorten_huge_values(text, error_lines):
    lines = error_lines(MINIMAL + text.format("x" * 2**20) + "\n")
    assert sum(map(len, lines)) < 500
    assert any("xxx" in line or "x..." in line for line in lines)


def test_error_message_shortens_huge_unknown_flag(error_lines):
    (line,) = error_lines(MINIMAL, "--" + "x" * 2**20)
    assert line.startswith("unrecognized arguments: --xxx") and len(line) < 500


def test_deeply_nested_file_raises_user_error(error_lines):
    (problem,) = error_lines(MINIMAL + "seed: " + "[" * 3000 + "\n")
    assert problem.startswith("FILE: not valid YAML: maximum recursion depth exceeded")


SINGLE_PROBLEMS = {
    "seed: 4294967296": "FILE:6: seed: Input should be less than 4294967296, found 4294967296",
    "objective: {mid_info_nce_threshold: .nan}": "FILE:6: objective.mid_info_nce_threshold: "
    "Input should be a finite number, found nan",
    "seed: -1": "FILE:6: seed: Input should be greater than or equal to 0, found -1",
    "encode_chunks: 0": "FILE:6: encode_chunks: Input should be greater than 0, found 0",
    "optimizer: 3": "FILE:6: optimizer: Input should be a valid dictionary or instance of OptimizerSettings, found 3",
    "mesh: {data: 0}": "FILE:6: mesh: data must be -1 (all remaining devices) or at least 1",
    "mesh: {data: -2}": "FILE:6: mesh.data: Input should be greater than or equal to -1, found -2",
    "prompt: {query: 'text'}": "FILE:6: prompt: query must contain the placeholder {instruction} exactly once",
    "prompt:\n  begin: null": "FILE:7: prompt.begin: Input should be a valid string, found None",
    "objective: {rank_kl_weight: -1}": "FILE:6: objective.rank_kl_weight: "
    "Input should be greater than or equal to 0, found -1",
    "objective: {ir_pool_size: 5}": "objective.ir_pool_size 5 must divide data.ir_global_batch_size 224; "
    "lower it, or set it to null to compare the whole batch",
    "objective: {ir: codi}": "FILE:6: objective.ir: Input should be 'info_nce' or 'cosent', found 'codi'",
    "objective: {sts: null}": "FILE:6: objective.sts: Input should be 'codi', 'info_nce' or 'cosent', found None",
    "optimizer: null": "FILE:6: optimizer: Input should be a valid dictionary or instance of OptimizerSettings, "
    "found None",
    "checkpoint: [keep]": "FILE:6: checkpoint: Input should be a valid dictionary or instance of CheckpointSettings, "
    "found ['keep']",
    "evaluation: {ir: null}": "FILE:6: evaluation.ir: expected a list of paths; use [] for none, found None",
    "  max_examples: 0": "FILE:6: data.max_examples: Input should be greater than 0, found 0",
}


@pytest.mark.parametrize("text", SINGLE_PROBLEMS)
def test_single_problem_is_reported_once(text, error_lines):
    assert error_lines(MINIMAL + text + "\n") == ["invalid settings:", "  " + SINGLE_PROBLEMS[text]]


def test_list_size_must_divide_batch_size(load, error_lines):
    text = MINIMAL.replace("ir: [", "sts: [") + "objective: {sts_list_size: 48}\n"
    assert error_lines(text)[1:] == [
        "  objective.sts_list_size 48 must divide data.sts_global_batch_size 256; lower it, or set it to null to "
        "compare the whole batch"
    ]
    assert load(text, "--objective.sts_list_size", "64").objective.sts_list_size == 64


def test_group_size_of_task_without_data_is_not_checked(load):
    assert load(MINIMAL + "objective: {sts_list_size: 48}\n").objective.sts_list_size == 48
    text = MINIMAL.replace("ir: [", "sts: [") + "objective: {ir_pool_size: 5}\n"
    assert load(text).objective.ir_pool_size == 5


def test_single_sampler_requires_one_batch_size(load, error_lines):
    text = MINIMAL + "  sts: [sts.jsonl]\n  sampler: single\n"
    (problem,) = error_lines(text)[1:]
    assert problem.startswith("  FILE:4: data: sampler: single requires one batch size")
    assert "ir_global_batch_size" in problem and "sts_global_batch_size" in problem
    assert load(text, "--data.ir_global_batch_size", "256").data.sampler == "single"
    assert load(MINIMAL + "  sampler: single\n").data.sampler == "single"  # there is only one task


def test_missing_data_raises_user_error(error_lines):
    text = "output_dir: o\nmodel: {path: m}\ndata: {}\n"
    assert error_lines(text)[1:] == ["  FILE:3: data: give at least one path in data.ir or data.sts"]


@pytest.mark.parametrize("flags", [["--nope", "1"], ["--model.nope=1"], ["--optim", "1"], ["stray"], ["--no-report"]])
def test_unknown_flag_raises_user_error(flags, error_lines):
    (line,) = error_lines(MINIMAL, *flags)
    assert line == "unrecognized arguments: " + " ".join(flags)


def test_flag_without_value_raises_user_error(error_lines):
    assert error_lines(MINIMAL, "--seed") == ["argument --seed: expected one argument"]


def test_malformed_yaml_raises_user_error(error_lines):
    header, *lines = error_lines("output_dir: [\n")
    assert header.startswith("FILE: not valid YAML:")
    assert any("line 2" in line for line in lines)


@pytest.mark.parametrize(("text", "kind"), [("- a\n", "list"), ("", "NoneType"), ("word", "str")])
def test_file_without_mapping_raises_user_error(text, kind, error_lines):
    assert error_lines(text) == [f"FILE: expected settings (`output_dir: …`), found {kind}"]


def test_binary_file_raises_user_error(tmp_path):
    (tmp_path / "settings.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"settings\.yaml: not valid YAML"):
        load_settings(tmp_path / "settings.yaml")


def test_missing_file_raises_user_error(tmp_path):
    with pytest.raises(UserError) as error:
        load_settings(tmp_path / "absent.yaml")
    assert str(error.value) == f"{tmp_path / 'absent.yaml'}: cannot be read: No such file or directory"
    with pytest.raises(UserError, match="is not a file"):
        load_settings(tmp_path)


def test_yaml_constructs_no_objects(tmp_path):
    folder = tmp_path / "created"
    (tmp_path / "settings.yaml").write_text(f"output_dir: !!python/object/apply:os.mkdir [{folder}]\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_settings(tmp_path / "settings.yaml")
    assert not folder.exists()


@pytest.mark.parametrize(
    ("section", "setting", "value"),
    [
        ("model", "pooling", "weighted_mean"), ("model", "pooling", "cls"), ("model", "pooling", "last_token"),
        ("model", "normalize", False), ("model", "projection_dim", 256), ("model", "dropout", 0.1),
        ("data", "sampler", "mixed"), ("data", "max_examples", 100), ("prompt", "include_in_pooling", True),
        ("objective", "ir", "cosent"), ("objective", "sts", "cosent"), ("objective", "sts", "info_nce"),
    ],
)  # fmt: skip
def test_ablation_settings(section, setting, value, load):
    settings = load(MINIMAL, f"--{section}.{setting}", str(value).lower())
    assert getattr(getattr(settings, section), setting) == value


def test_ir_share_requires_single_task_steps_of_both_tasks(load, error_lines):
    both = MINIMAL + "  sts: [sts.jsonl]\n"
    assert load(both, "--data.ir_share", "0.25").data.ir_share == 0.25
    (problem,) = error_lines(MINIMAL + "  ir_share: 0.25\n")[1:]
    assert problem.startswith("  FILE:4: data: ir_share requires data for both tasks")
    text = both + "  ir_share: 0.25\n  sampler: mixed\n  sts_global_batch_size: 224\n"
    (problem,) = error_lines(text)[1:]
    assert problem.startswith("  FILE:4: data: ir_share requires steps of a single task")
    for share in ("0", "1", "-0.5", "nan"):
        (problem,) = error_lines(both, "--data.ir_share", share)[1:]
        assert problem.startswith("  --data.ir_share: ")


def test_mixed_sampler_requires_one_batch_size(error_lines):
    (problem,) = error_lines(MINIMAL + "  sts: [sts.jsonl]\n  sampler: mixed\n")[1:]
    assert problem.startswith("  FILE:4: data: sampler: mixed requires one batch size")


def test_row_tokens_require_packing_and_hold_the_longest_text(load, error_lines):
    (problem,) = error_lines(MINIMAL + "  packing: false\n  row_tokens: 1024\n")[1:]
    assert problem.startswith("  FILE:4: data: row_tokens requires packing: true")
    limits = "  query_max_tokens: 64\n  passage_max_tokens: 200\n"
    for text in (limits, "  query_max_tokens: 200\n  passage_max_tokens: 64\n"):
        (problem,) = error_lines(MINIMAL + text + "  row_tokens: 199\n")[1:]
        assert problem.startswith(
            "  FILE:4: data: row_tokens 199 must be at least query_max_tokens and passage_max_tokens, 200"
        )
        assert load(MINIMAL + text + "  row_tokens: 200\n").data.row_tokens == 200
    assert load(MINIMAL + limits + "  packing: false\n").data.row_tokens is None


def test_tasks_are_those_with_data(load):
    ir, sts = load(
        MINIMAL
        + "  sts: [a, b]\n  ir_global_batch_size: 6\nobjective: {sts: cosent, ir_pool_size: 2, sts_list_size: 8}\n"
    ).tasks
    assert ir == TaskSpec(
        name="ir",
        paths=[Path("ir.jsonl")],
        global_batch_size=6,
        group_size=2,
        objective="info_nce",
        batch_size_setting="data.ir_global_batch_size",
        group_size_setting="objective.ir_pool_size",
    )
    assert sts == TaskSpec(
        name="sts",
        paths=[Path("a"), Path("b")],
        global_batch_size=256,
        group_size=8,
        objective="cosent",
        batch_size_setting="data.sts_global_batch_size",
        group_size_setting="objective.sts_list_size",
    )
    assert [task.name for task in load(MINIMAL).tasks] == ["ir"]
    assert [task.name for task in load(MINIMAL.replace("ir: [", "sts: [")).tasks] == ["sts"]


def test_every_setting_has_a_flag_with_a_description(capsys):
    def names(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for name, value in values.items():
            yield from names(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]

    settings = set(names(yaml.safe_load(DEFAULTS)))
    flags = {action.option_strings[0]: action.help for action in flags_parser()._actions}
    assert set(flags) == {f"--{name}" for name in settings}
    assert all(flags.values())
    flags_parser().print_help()
    assert "--optimizer.learning_rate VALUE" in capsys.readouterr().out
