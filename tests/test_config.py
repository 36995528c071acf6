"""Settings: their defaults, flags over file, and what is said of those that cannot be used."""

import re
from pathlib import Path

import pytest
import yaml

from codiemb_jax.config import Settings, TaskSpec
from codiemb_jax.config_file import flags_parser, load_settings
from codiemb_jax.errors import UserError

LEAST = """output_dir: runs/name
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
  pooling: mean
  normalize: true
  projection_dim: null
  dropout: null
  compute_dtype: bfloat16
  param_dtype: float32
  remat: full
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
evaluation: {ir: [], sts: []}
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
encode_chunks: 1
mesh: {data: -1, fsdp: 1, tensor: 1}
checkpoint: {every_steps: null, every_epochs: 1, keep: 3}
export: true
"""


@pytest.fixture
def load(tmp_path):
    """Loads settings from a text and flags."""

    def load(text: str, *flags: str) -> Settings:
        (tmp_path / "settings.yaml").write_text(text, encoding="utf-8")
        return load_settings(tmp_path / "settings.yaml", flags)

    return load


@pytest.fixture
def refused(load, tmp_path):
    """The lines of the message about settings that cannot be used; FILE stands for the file's path."""

    def refused(text: str, *flags: str) -> list[str]:
        with pytest.raises(UserError) as caught:
            load(text, *flags)
        return str(caught.value).replace(str(tmp_path / "settings.yaml"), "FILE").splitlines()

    return refused


def test_defaults_are_the_documented_ones(load):
    assert load(LEAST).model_dump(mode="json") == yaml.safe_load(DEFAULTS)


def test_what_a_file_says_is_taken(load):
    settings = load(
        LEAST
        + "  sts: [a, b]\n  sts_global_batch_size: 64\nseed: 7\noptimizer:\n  learning_rate: 1e-5\n  betas: [0.8, 0.95]"
        "\n  clip_norm: 1\nobjective: {sts_list_size: null}\nexport: false\ncheckpoint: {every_epochs: null}\n"
    )
    assert settings.data.sts == [Path("a"), Path("b")]
    assert settings.data.sts_global_batch_size == 64
    assert settings.seed == 7
    assert settings.optimizer.learning_rate == 1e-5  # YAML 1.1 would read 1e-5 as a text
    assert settings.optimizer.betas == (0.8, 0.95)
    assert settings.optimizer.clip_norm == 1.0
    assert settings.objective.sts_list_size is None
    assert settings.checkpoint.every_epochs is None
    assert settings.export is False
    assert settings.optimizer.epochs == 4


def test_resolved_settings_load_again(load):
    first = load(LEAST, "--optimizer.betas", "[0.8, 0.9]", "--optimizer.eps", "1e-6", "--prompt.query", "")
    assert load(yaml.safe_dump(first.model_dump(mode="json"))) == first


def test_flags_win_over_the_file_key_by_key(load):
    text = LEAST + "seed: 7\noptimizer:\n  learning_rate: 1.0e-3\n  epochs: 9\n"
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


def test_flags_give_what_the_file_lacks(load):
    settings = load("seed: 3\n", "--output_dir", "o", "--model.path", "m", "--data.sts", "s")
    assert (settings.seed, settings.output_dir, settings.model.path) == (3, Path("o"), "m")
    assert (settings.data.ir, settings.data.sts) == ([], [Path("s")])


def test_a_list_as_a_flag_replaces_the_files(load):
    for flags in (["--data.ir", "x", "--data.ir", "y"], ["--data.ir", "x,y"], ["--data.ir", '["x","y"]']):
        assert load(LEAST, *flags).data.ir == [Path("x"), Path("y")]


def test_null_as_a_flag(load):
    text = LEAST + "optimizer: {clip_norm: 1.0, max_steps: 5}\n"
    settings = load(
        text, "--objective.sts_list_size", "null", "--checkpoint.every_epochs=null", "--optimizer.clip_norm", "null"
    )
    assert settings.objective.sts_list_size is None
    assert settings.checkpoint.every_epochs is None
    assert settings.optimizer.clip_norm is None
    assert settings.optimizer.max_steps == 5


def test_the_environment_is_ignored(load, monkeypatch):
    expected = load(LEAST)
    for name, value in {
        "SEED": "7", "seed": "7", "OUTPUT_DIR": "elsewhere", "MODEL": '{"path": "q"}', "MODEL__PATH": "q",
        "OPTIMIZER": '{"epochs": 9}', "DATA": "no JSON", "EXPORT": "false",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert load(LEAST) == expected


def test_everything_that_is_wrong_is_told_at_once_by_file_line_and_field(refused):
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
    head, *problems = refused(text)
    assert head == "invalid settings:"
    expected = {
        "FILE: output_dir: is missing": "",
        "FILE: model.path: is missing": "",
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


@pytest.mark.parametrize("name", ["encode_chunk", "cli_args", "_cli_parse_args", "_env_file", "model_config", "1"])
def test_an_unknown_name_at_the_top(name, refused):
    assert refused(LEAST + f"{name}: 2\nOther: 3\n")[1:] == [
        f"  FILE:6: {name}: unknown setting",
        "  FILE:7: Other: unknown setting",
    ]


def test_a_setting_given_twice_in_the_file(refused):
    text = LEAST + "seed: 1\noptimizer:\n  epochs: 1\n  epochs: 1\nseed: 2\n"
    assert refused(text)[1:] == [
        "  FILE:9: optimizer.epochs: duplicate key",
        "  FILE:10: seed: duplicate key",
    ]


def test_a_scalar_given_twice_as_a_flag(refused):
    assert refused(LEAST, "--seed", "1", "--seed=2", "--optimizer.betas", "0,0", "--optimizer.betas", "0,0") == [
        "invalid settings:",
        "  --seed: given 2 times",
        "  --optimizer.betas: given 2 times",
    ]


def test_lists_as_flags_accumulate_however_they_are_written(load):
    flags = ["--data.ir", "a,b", "--data.ir", '["c", "d"]', "--data.ir=e", "--data.ir", "[f]"]
    assert load(LEAST, *flags).data.ir == [Path(name) for name in "abcdef"]


def test_a_flag_changes_one_place_of_what_an_anchor_uses_twice(load):
    text = LEAST.replace("data:", "data: &data") + "evaluation: *data\n"
    settings = load(text, "--data.ir", "other", "--evaluation.sts", "held_out")
    assert (settings.data.ir, settings.data.sts) == ([Path("other")], [])
    assert (settings.evaluation.ir, settings.evaluation.sts) == ([Path("ir.jsonl")], [Path("held_out")])


def test_a_wrong_flag_is_told_as_a_flag(refused):
    assert refused(LEAST + "seed: 1\n", "--seed", "abc", "--data.ir_global_batch_size=0") == [
        "invalid settings:",
        "  --seed: Input should be a valid integer, found 'abc'",
        "  --data.ir_global_batch_size: Input should be greater than 0, found 0",
    ]


def test_no_data_of_a_task_is_an_empty_list(load, refused):
    both = LEAST + "  sts: [sts.jsonl]\n"
    assert refused(both, "--data.sts", "null")[1:] == [
        "  --data.sts: expected a list of paths; for no path at all give [], found None"
    ]
    assert load(both, "--data.sts", "[]").data.sts == []


def test_a_single_path_stands_for_a_list_of_one(load):
    settings = load(LEAST.replace("[ir.jsonl]", "ir.jsonl") + "  sts: a,b\nevaluation: {sts: held out}\n")
    assert settings.data.ir == [Path("ir.jsonl")]
    assert settings.data.sts == [Path("a,b")]  # commas divide a flag, not the file's text
    assert settings.evaluation.sts == [Path("held out")]


def test_a_path_may_begin_with_the_home_directory(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    settings = load(LEAST.replace("runs/name", "~/run").replace("folder", "~/model"), "--data.ir", "~,~/b")
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
    ],
)
def test_numbers_as_json_writes_them(text, value, load):
    assert load(LEAST + f"optimizer: {{learning_rate: {text}}}\n").optimizer.learning_rate == value
    assert load(LEAST, "--optimizer.learning_rate", text).optimizer.learning_rate == value


NOT_THE_TYPE = {
    ("seed", "true"): "Input should be a valid integer, found True",
    ("seed", "'1'"): "Input should be a valid integer, found '1'",
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
    ("data.ir_share", "'0.5'"): "Input should be a valid number, found '0.5'",
    ("model.dropout", "false"): "Input should be a valid number, found False",
    ("export", "1"): "Input should be a valid boolean, found 1",
    ("model.normalize", "'true'"): "Input should be a valid boolean, found 'true'",
    ("prompt.include_in_pooling", "0"): "Input should be a valid boolean, found 0",
}


def with_setting(name: str, value: str) -> tuple[str, int]:
    """LEAST with one more setting, and the setting's line."""
    section, _, key = name.rpartition(".")
    if section == "data":
        return LEAST + f"  {key}: {value}\n", 6
    if section == "model":
        return LEAST.replace("data:\n", f"  {key}: {value}\ndata:\n"), 4
    return (LEAST + f"{section}:\n  {key}: {value}\n", 7) if section else (LEAST + f"{key}: {value}\n", 6)


@pytest.mark.parametrize(("name", "value"), NOT_THE_TYPE)
def test_a_value_of_another_type_is_not_converted(name, value, refused):
    text, line = with_setting(name, value)
    assert refused(text) == ["invalid settings:", f"  FILE:{line}: {name}: {NOT_THE_TYPE[name, value]}"]
    assert refused(LEAST, f"--{name}", value) == ["invalid settings:", f"  --{name}: {NOT_THE_TYPE[name, value]}"]


def test_each_of_two_rates_is_a_number(refused):
    problem = "optimizer.betas.0: Input should be a valid number, found True"
    assert refused(LEAST + "optimizer:\n  betas: [true, 0.9]\n")[1:] == [f"  FILE:7: {problem}"]
    assert refused(LEAST, "--optimizer.betas", "true,0.9")[1:] == [f"  --{problem}"]
    assert refused(LEAST, "--optimizer.betas", "0.9")[1:] == ["  --optimizer.betas.1: is missing"]


COUNTS = [
    "encode_chunks", "data.max_examples", "data.ir_global_batch_size", "data.sts_global_batch_size",
    "data.query_max_tokens", "data.passage_max_tokens",
    "objective.ir_pool_size", "objective.sts_list_size", "optimizer.warmup_steps", "optimizer.epochs",
    "optimizer.max_steps", "mesh.data", "mesh.fsdp", "mesh.tensor", "checkpoint.every_steps",
    "checkpoint.every_epochs", "checkpoint.keep",
]  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_is_an_int32(name, load, refused):
    problem = f"{name}: Input should be less than or equal to 2147483647, found 2147483648"
    text, line = with_setting(name, "2147483648")
    assert refused(text)[1:] == [f"  FILE:{line}: {problem}"]
    assert refused(LEAST, f"--{name}", "2147483648")[1:] == [f"  --{problem}"]
    section, _, key = name.rpartition(".")
    if name != "objective.ir_pool_size":  # which must divide a batch size, too
        settings = load(LEAST, f"--{name}", "2147483647")
        assert getattr(getattr(settings, section) if section else settings, key) == 2147483647


@pytest.mark.parametrize("name", ["data.positives_per_query", "data.negatives_per_query"])
def test_passages_of_a_query_are_counted_in_hundreds(name, load, refused):
    problem = f"{name}: Input should be less than or equal to 1024, found 1025"
    assert refused(LEAST, f"--{name}", "1025")[1:] == [f"  --{problem}"]
    assert getattr(load(LEAST, f"--{name}", "1024").data, name.partition(".")[2]) == 1024


IN_FLOAT32 = {
    "optimizer.learning_rate": "1e300", "optimizer.weight_decay": "1e300", "optimizer.eps": "1e-300",
    "objective.temperature": "1e-320", "objective.pearson_weight": "1e16",
}  # fmt: skip


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_a_number_that_float32_does_not_hold(name, load, refused):
    (problem,) = refused(LEAST, f"--{name}", IN_FLOAT32[name])[1:]
    assert problem.startswith(f"  --{name}: must be 0 or between 1e-30 and 1e15 in size, found ")


def test_a_decay_rate_that_is_1_in_float32(load, refused):
    (problem,) = refused(LEAST, "--optimizer.betas", "[0.9, 0.99999999999]")[1:]
    assert problem.startswith("  --optimizer.betas.1: is 1 in float32")
    assert load(LEAST, "--optimizer.betas", "[0.9, 0.9999999]").optimizer.betas[1] == 0.9999999


def test_a_number_of_thousands_of_digits(refused):
    (problem,) = refused(LEAST + "seed: " + "9" * 4000 + "\n")[1:]
    assert problem.startswith("  FILE:6: seed: Input should be less than 4294967296, found 9999")
    assert len(problem) < 200
    assert refused(LEAST + "seed: 0x" + "f" * 5000 + "\n")[1:] == [
        "  FILE:6: seed: Input should be less than 4294967296, found a huge number"
    ]
    head, place, *_ = refused(LEAST + "seed: " + "9" * 5000 + "\n")  # more than Python reads
    assert head.startswith("FILE: not valid YAML: '9999") and head.endswith("cannot be read as int")
    assert place == '  in "FILE", line 6, column 7:'


@pytest.mark.parametrize(
    ("value", "kind"),
    [("!!bool maybe", "bool"), ("!!int ''", "int"), ("!!float ''", "float"), ("!!timestamp x", "timestamp"),
     ("2001-99-99", "timestamp")],
)  # fmt: skip
def test_a_value_that_is_none_of_its_tag(value, kind, refused):
    head, place, *_ = refused(LEAST + f"seed: {value}\n")
    assert head.startswith("FILE: not valid YAML: ") and head.endswith(f" cannot be read as {kind}")
    assert place == '  in "FILE", line 6, column 7:'
    assert refused(LEAST, "--seed", value)[1:] == [f"  --seed: Input should be a valid integer, found {value!r}"]


@pytest.mark.parametrize("text", ["loop: &a [1, *a]", "optimizer: &a {epochs: 1, loop: *a}", "loop: &a {b: [{c: *a}]}"])
def test_an_anchor_that_contains_itself(text, refused):
    (problem,) = refused(LEAST + text + "\n")[1:]
    name = {"loop: &a [": "loop.1", "optimizer:": "optimizer.loop", "loop: &a {": "loop.b.0.c"}[text[:10]]
    assert problem == f"  FILE:6: {name}: the anchor contains itself"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("shape", ["[{0}, {0}, {0}, {0}]", "{{a: {0}, b: {0}, c: {0}}}", "{{<<: [{0}, {0}, {0}]}}"])
def test_anchors_that_expand_enormously(shape, refused):
    lines = ["0: &a0 {seed: 1}", *(f"{n}: &a{n} " + shape.format(f"*a{n - 1}") for n in range(1, 60))]
    (problem,) = refused(LEAST + "\n".join(lines) + "\n")[1:]
    assert re.match(r"  FILE:\d+: \d+\..*: more than 10000 values once anchors are expanded$", problem)
    assert len(problem) < 300


def test_anchors_and_merge_keys(load, refused):
    text = LEAST + "checkpoint: &c {keep: 2}\noptimizer:\n  <<: {epochs: 3, eps: 1e-6}\n  epochs: 5\n"
    settings = load(text)
    assert (settings.optimizer.epochs, settings.optimizer.eps, settings.checkpoint.keep) == (5, 1e-6, 2)
    assert refused(text.replace("epochs: 5", "epochs: 0"))[1:] == [
        "  FILE:9: optimizer.epochs: Input should be greater than 0, found 0"
    ]
    assert refused(text.replace("eps: 1e-6", "eps: 0"))[1:] == [
        "  FILE:8: optimizer.eps: Input should be greater than 0, found 0"
    ]


@pytest.mark.parametrize("key", ["? [seed]\n", "? {seed: 1}\n", '"a\\nb"', '"a\\ud800"', '"a\\0"', '""'])
def test_a_key_that_cannot_be_a_name(key, refused):
    assert refused(LEAST + f"optimizer:\n  epochs: 1\n{key}: 3\n")[1:] == [
        "  FILE:8: a key must be the name of a setting"
    ]
    assert refused(LEAST + f"optimizer: {{{key.strip()} : 3}}\n")[1:] == [
        "  FILE:6: optimizer: a key must be the name of a setting"
    ]


@pytest.mark.parametrize("key", ["1", "1.5", "true", "null", "2001-01-01", "~"])
def test_a_key_that_is_no_text(key, refused):
    assert refused(LEAST + f"optimizer:\n  {key}: 3\n")[1:] == [f"  FILE:7: optimizer.{key}: unknown setting"]
    assert refused(LEAST + f"{key}: 3\n'{key}': 3\n")[1:] == [f"  FILE:7: {key}: duplicate key"]


WRONG_TEXTS = {
    '"a\\0b"': ("a\0b", "must not hold a NUL character, found 'a\\x00b'"),
    '"a\\ud800b"': ("a\ud800b", "must be valid Unicode, without lone surrogates, found 'a\\ud800b'"),
}
WRONG_PATHS = WRONG_TEXTS | {
    '""': ("", "a path must be a text that is not empty, found ''"),
    "~nosuchuser/x": ("~nosuchuser/x", "there is no home directory for ~nosuchuser, found '~nosuchuser/x'"),
}


@pytest.mark.parametrize("value", WRONG_PATHS)
@pytest.mark.parametrize(
    ("name", "written", "line"),
    [("output_dir", "runs/name", 1), ("model.path", "folder", 3), ("data.ir.0", "[ir.jsonl]", 5)],
)
def test_a_text_that_is_no_path(name, written, line, value, refused):
    as_flag, problem = WRONG_PATHS[value]
    assert refused(LEAST.replace(written, value)) == ["invalid settings:", f"  FILE:{line}: {name}: {problem}"]
    flag = name.removesuffix(".0")
    assert refused(LEAST, f"--{flag}", as_flag) == ["invalid settings:", f"  --{name}: {problem}"]


@pytest.mark.parametrize(("value", "found"), [("3", "3"), ("true", "True"), ("!!binary aGk=", "b'hi'"), ("[]", "[]")])
def test_a_path_is_a_text(value, found, refused):
    text = f"output_dir: {value}\nmodel: {{path: {value}}}\ndata: {{ir: [{value}]}}\n"
    assert refused(text)[1:] == [
        f"  FILE:{line}: {name}: a path must be a text that is not empty, found {found}"
        for line, name in enumerate(["output_dir", "model.path", "data.ir.0"], 1)
    ]


@pytest.mark.parametrize("name", ["begin", "query", "passage", "end", "default_instruction"])
def test_a_text_that_is_no_prompt(name, load, refused):
    for value, (as_flag, problem) in WRONG_TEXTS.items():
        assert refused(LEAST + f"prompt:\n  {name}: {value}\n")[1:] == [f"  FILE:7: prompt.{name}: {problem}"]
        assert refused(LEAST, f"--prompt.{name}", as_flag)[1:] == [f"  --prompt.{name}: {problem}"]
    longest = "{instruction}" + "x" * (10_000 - len("{instruction}"))
    assert getattr(load(LEAST, f"--prompt.{name}", longest).prompt, name) == longest
    problem = f"prompt.{name}: String should have at most 10000 characters, found '{{instruction}}xxx"
    for line in (
        *refused(LEAST + f"prompt:\n  {name}: '{longest}x'\n")[1:],
        *refused(LEAST, f"--prompt.{name}", longest + "x")[1:],
    ):
        assert line.startswith((f"  FILE:7: {problem}", f"  --{problem}"))
        assert len(line) < 200


HUGE = [
    "evaluation: {{ir: ~{}}}", "? {}\n: 1", "optimizer: {{? {} : 1}}", "? {0}\n: 1\n? {0}\n: 1", "seed: *{}",
    "seed: !{} 1", "seed: {}", "prompt: {{begin: {}}}", "objective: {{ir: {}}}", "evaluation: {{ir: [[{}]]}}",
    "mesh: {}",
]  # fmt: skip


@pytest.mark.parametrize("text", HUGE)
def test_messages_do_not_repeat_megabytes(text, refused):
    lines = refused(LEAST + text.format("x" * 2**20) + "\n")
    assert sum(map(len, lines)) < 500
    assert any("xxx" in line or "x..." in line for line in lines)


def test_a_huge_unknown_flag(refused):
    (line,) = refused(LEAST, "--" + "x" * 2**20)
    assert line.startswith("unrecognized arguments: --xxx") and len(line) < 500


def test_a_file_as_deep_as_python_goes(refused):
    (problem,) = refused(LEAST + "seed: " + "[" * 3000 + "\n")
    assert problem.startswith("FILE: not valid YAML: maximum recursion depth exceeded")


def test_what_is_gone_is_unknown(refused):
    assert refused(LEAST.replace("data:", "  attention_backend: auto\ndata:") + "distributed: {}\n")[1:] == [
        "  FILE:4: model.attention_backend: unknown setting",
        "  FILE:7: distributed: unknown setting",
    ]
    for name in ("model.attention_backend", "distributed.coordinator"):
        assert refused(LEAST, f"--{name}", "auto") == [f"unrecognized arguments: --{name} auto"]


WRONG_ONE = {
    "seed: 4294967296": "FILE:6: seed: Input should be less than 4294967296, found 4294967296",
    "objective: {mid_info_nce_threshold: .nan}": "FILE:6: objective.mid_info_nce_threshold: "
    "Input should be a finite number, found nan",
    "seed: -1": "FILE:6: seed: Input should be greater than or equal to 0, found -1",
    "encode_chunks: 0": "FILE:6: encode_chunks: Input should be greater than 0, found 0",
    "optimizer: 3": "FILE:6: optimizer: Input should be a valid dictionary or instance of OptimizerSettings, found 3",
    "mesh: {data: 0}": "FILE:6: mesh: data must be -1 (all devices that are left) or at least 1",
    "mesh: {data: -2}": "FILE:6: mesh.data: Input should be greater than or equal to -1, found -2",
    "prompt: {query: 'no place'}": "FILE:6: prompt: query must hold the placeholder {instruction} exactly once",
    "prompt:\n  begin: null": "FILE:7: prompt.begin: Input should be a valid string, found None",
    "objective: {rank_kl_weight: -1}": "FILE:6: objective.rank_kl_weight: "
    "Input should be greater than or equal to 0, found -1",
    "objective: {ir_pool_size: 5}": "objective.ir_pool_size 5 must divide data.ir_global_batch_size 224",
    "objective: {ir: codi}": "FILE:6: objective.ir: Input should be 'info_nce' or 'cosent', found 'codi'",
    "objective: {sts: null}": "FILE:6: objective.sts: Input should be 'codi', 'info_nce' or 'cosent', found None",
    "optimizer: null": "FILE:6: optimizer: Input should be a valid dictionary or instance of OptimizerSettings, "
    "found None",
    "checkpoint: [keep]": "FILE:6: checkpoint: Input should be a valid dictionary or instance of CheckpointSettings, "
    "found ['keep']",
    "evaluation: {ir: null}": "FILE:6: evaluation.ir: expected a list of paths; for no path at all give [], found None",
    "  max_examples: 0": "FILE:6: data.max_examples: Input should be greater than 0, found 0",
}


@pytest.mark.parametrize("wrong", WRONG_ONE)
def test_one_wrong_setting_is_the_only_one_told(wrong, refused):
    assert refused(LEAST + wrong + "\n") == ["invalid settings:", "  " + WRONG_ONE[wrong]]


def test_a_list_size_must_divide_the_batch(load, refused):
    text = LEAST.replace("ir: [", "sts: [") + "objective: {sts_list_size: 48}\n"
    assert refused(text)[1:] == ["  objective.sts_list_size 48 must divide data.sts_global_batch_size 256"]
    assert load(text, "--objective.sts_list_size", "64").objective.sts_list_size == 64


def test_sizes_of_a_task_that_is_not_trained_do_not_matter(load):
    assert load(LEAST + "objective: {sts_list_size: 48}\n").objective.sts_list_size == 48
    text = LEAST.replace("ir: [", "sts: [") + "objective: {ir_pool_size: 5}\n"
    assert load(text).objective.ir_pool_size == 5


def test_the_single_sampler_has_one_batch_size(load, refused):
    text = LEAST + "  sts: [sts.jsonl]\n  sampler: single\n"
    (problem,) = refused(text)[1:]
    assert problem.startswith("  FILE:4: data: sampler: single has one batch size")
    assert "ir_global_batch_size" in problem and "sts_global_batch_size" in problem
    assert load(text, "--data.ir_global_batch_size", "256").data.sampler == "single"
    assert load(LEAST + "  sampler: single\n").data.sampler == "single"  # one task has one batch size


def test_data_of_neither_task(refused):
    text = "output_dir: o\nmodel: {path: m}\ndata: {}\n"
    assert refused(text)[1:] == ["  FILE:3: data: give at least one path under data.ir or data.sts"]


@pytest.mark.parametrize("flags", [["--nope", "1"], ["--model.nope=1"], ["--optim", "1"], ["stray"], ["--no-export"]])
def test_an_unknown_flag_is_one_short_line(flags, refused):
    (line,) = refused(LEAST, *flags)
    assert line == "unrecognized arguments: " + " ".join(flags)


def test_a_flag_without_its_value(refused):
    assert refused(LEAST, "--seed") == ["argument --seed: expected one argument"]


def test_malformed_yaml(refused):
    first, *rest = refused("output_dir: [\n")
    assert first.startswith("FILE: not valid YAML:")
    assert any("line 2" in line for line in rest)


@pytest.mark.parametrize(("text", "kind"), [("- a\n", "list"), ("", "NoneType"), ("word", "str")])
def test_not_a_mapping(text, kind, refused):
    assert refused(text) == [f"FILE: expected settings (`output_dir: …`), found {kind}"]


def test_not_text(tmp_path):
    (tmp_path / "settings.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"settings\.yaml: not valid YAML"):
        load_settings(tmp_path / "settings.yaml")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError) as caught:
        load_settings(tmp_path / "absent.yaml")
    assert str(caught.value) == f"{tmp_path / 'absent.yaml'}: cannot be read: No such file or directory"
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_settings(tmp_path)


def test_yaml_makes_no_objects(tmp_path):
    mark = tmp_path / "mark"
    (tmp_path / "settings.yaml").write_text(f"output_dir: !!python/object/apply:os.mkdir [{mark}]\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_settings(tmp_path / "settings.yaml")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("section", "setting", "value"),
    [
        ("model", "pooling", "weighted_mean"), ("model", "pooling", "cls"), ("model", "pooling", "last_token"),
        ("model", "normalize", False), ("model", "projection_dim", 256), ("model", "dropout", 0.1),
        ("data", "sampler", "mixed"), ("data", "max_examples", 100), ("prompt", "include_in_pooling", True),
        ("objective", "ir", "cosent"), ("objective", "sts", "cosent"), ("objective", "sts", "info_nce"),
    ],
)  # fmt: skip
def test_settings_of_the_ablations_are_taken(section, setting, value, load):
    found = load(LEAST, f"--{section}.{setting}", str(value).lower())
    assert getattr(getattr(found, section), setting) == value


def test_a_share_needs_steps_of_both_tasks(load, refused):
    both = LEAST + "  sts: [sts.jsonl]\n"
    assert load(both, "--data.ir_share", "0.25").data.ir_share == 0.25
    (problem,) = refused(LEAST + "  ir_share: 0.25\n")[1:]
    assert problem.startswith("  FILE:4: data: ir_share needs data of both tasks")
    text = both + "  ir_share: 0.25\n  sampler: mixed\n  sts_global_batch_size: 224\n"
    (problem,) = refused(text)[1:]
    assert problem.startswith("  FILE:4: data: ir_share needs steps of one task each")
    for share in ("0", "1", "-0.5", "nan"):
        (problem,) = refused(both, "--data.ir_share", share)[1:]
        assert problem.startswith("  --data.ir_share: ")


def test_the_mixed_sampler_has_one_batch_size(refused):
    (problem,) = refused(LEAST + "  sts: [sts.jsonl]\n  sampler: mixed\n")[1:]
    assert problem.startswith("  FILE:4: data: sampler: mixed has one batch size")


def test_tasks_are_those_that_there_is_data_for(load):
    ir, sts = load(
        LEAST
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
    assert [task.name for task in load(LEAST).tasks] == ["ir"]
    assert [task.name for task in load(LEAST.replace("ir: [", "sts: [")).tasks] == ["sts"]


def test_every_setting_is_a_flag_with_its_description(capsys):
    settings = {
        f"{section}.{name}" if isinstance(value, dict) else section
        for section, value in yaml.safe_load(DEFAULTS).items()
        for name in (value if isinstance(value, dict) else [""])
    }
    flags = {action.option_strings[0]: action.help for action in flags_parser()._actions}
    assert set(flags) == {f"--{name}" for name in settings}
    assert all(flags.values())
    flags_parser().print_help()
    assert "--optimizer.learning_rate VALUE" in capsys.readouterr().out
