"""Settings: their defaults, flags over file, and what is said of those that cannot be used."""

from pathlib import Path

import pytest
import yaml

from codiemb_jax.config import Settings, load_settings
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
  compute_dtype: bfloat16
  param_dtype: float32
  remat: full
  attention_backend: auto
prompt:
  begin: ""
  query: "Instruction: {instruction} Query: "
  passage: ""
  end: ""
  default_instruction: "Given a search query, retrieve passages that answer the question"
data:
  ir: [ir.jsonl]
  sts: []
  sampler: dynamic
  ir_share: null
  ir_global_batch_size: 224
  sts_global_batch_size: 256
  positives_per_query: 2
  negatives_per_query: 4
  query_max_tokens: 1024
  passage_max_tokens: 1024
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
distributed: {coordinator: null, num_processes: null, process_id: null}
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
    resolved = load(LEAST).model_dump(mode="json")
    for name, value in yaml.safe_load(DEFAULTS).items():
        if isinstance(value, dict):
            assert {key: resolved[name][key] for key in value} == value, name
        else:
            assert resolved[name] == value, name


def test_what_a_file_says_is_taken(load):
    settings = load(
        LEAST
        + "  sts: [a, b]\n  sts_global_batch_size: 64\nseed: 7\noptimizer:\n  learning_rate: 1e-5\n  betas: [0.8, 0.95]"
        "\n  clip_norm: 1\nobjective: {sts_list_size: null}\nexport: false\ncheckpoint: {every_epochs: null}\n"
    )
    assert settings.data.sts == [Path("a"), Path("b")]
    assert settings.data.sts_global_batch_size == 64
    assert settings.seed == 7
    assert settings.optimizer.learning_rate == 1e-5  # YAML reads 1e-5 as a string
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
    assert head == "settings cannot be used:"
    expected = {
        "FILE: output_dir: is missing": "",
        "FILE: model.path: is missing": "",
        "FILE:2: model.pth: there is no such setting": "",
        "FILE:3: model.remat: ": "'none', 'dots' or 'full', found 'some'",
        "FILE:4: seed: ": "greater than or equal to 0, found -1",
        "FILE:5: encode_chunks: ": "greater than 0, found 0",
        "FILE:7: data.ir.1: ": "found [2]",
        "FILE:8: data.ir_global_batch_size: ": "valid integer, unable to parse string as an integer, found 'many'",
        "FILE:10: optimizer.betas.1: ": "less than 1, found 1.0",
        "FILE:11: optimizer.learning_rate: ": "finite number, found nan",
        "FILE:12: optimizer.epochs: ": "found 1.5",
        "FILE:13: optimizer.warmup_ratio: ": "less than or equal to 1, found 1.01",
        "FILE:15: objective.temperature: ": "greater than 0, found 0",
        "FILE:16: mesh.fsdp: ": "greater than 0, found 0",
        "FILE:16: mesh.rows: there is no such setting": "",
    }
    for start, end in expected.items():
        assert [p for p in problems if p.startswith("  " + start) and p.endswith(end)], start
    assert len(problems) == len(expected)


@pytest.mark.parametrize("name", ["encode_chunk", "cli_args", "_cli_parse_args", "_env_file", "model_config", "1"])
def test_an_unknown_name_at_the_top(name, refused):
    assert refused(LEAST + f"{name}: 2\nOther: 3\n")[1:] == [
        f"  FILE:6: {name}: there is no such setting",
        "  FILE:7: Other: there is no such setting",
    ]


def test_a_setting_that_stands_twice(refused):
    assert refused(LEAST + "seed: 1\noptimizer:\n  epochs: 1\n  epochs: 1\nseed: 2\n")[1:] == [
        "  FILE:9: epochs: stands twice",
        "  FILE:10: seed: stands twice",
    ]


def test_a_wrong_flag_is_told_as_a_flag(refused):
    assert refused(LEAST + "seed: 1\n", "--seed", "abc", "--data.ir_global_batch_size=0") == [
        "settings cannot be used:",
        "  --seed: Input should be a valid integer, unable to parse string as an integer, found 'abc'",
        "  --data.ir_global_batch_size: Input should be greater than 0, found '0'",
    ]


def test_no_data_of_a_task_is_an_empty_list(load, refused):
    both = LEAST + "  sts: [sts.jsonl]\n"
    assert refused(both, "--data.sts", "null")[1:] == [
        "  --data.sts.0: a path must not be empty; for no path at all give [], found None"
    ]
    assert load(both, "--data.sts", "[]").data.sts == []


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
}


@pytest.mark.parametrize("wrong", WRONG_ONE)
def test_one_wrong_setting_is_the_only_one_told(wrong, refused):
    assert refused(LEAST + wrong + "\n") == ["settings cannot be used:", "  " + WRONG_ONE[wrong]]


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
        ("data", "sampler", "mixed"),
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
