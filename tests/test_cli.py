"""The console command: its subcommands are the programs, and configurations of the package are found by name."""

import os
import re
from pathlib import Path

import pytest

from codiemb_jax import __version__
from codiemb_jax.cli import PROGRAMS, main
from codiemb_jax.config import Settings
from codiemb_jax.config_file import CONFIGS, all_settings, find_config, flags_parser, load_settings
from codiemb_jax.errors import UserError

PACKAGE = Path(__file__).parent.parent / "codiemb_jax"


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    try:
        main([*arguments, "--help"])
    except SystemExit as end:
        assert end.code == 0
    return capsys.readouterr().out


def test_help_lists_every_subcommand(capsys):
    text = help_of(capsys)
    assert text.startswith("usage: codiemb ")
    for name, (_, help_text) in PROGRAMS.items():
        assert re.search(rf"\b{name}\s+{help_text}", text)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_of_a_subcommand_is_that_of_its_program(name, capsys):
    assert help_of(capsys, name).startswith(f"usage: codiemb {name} ")


def test_help_of_train_lists_every_setting(capsys):
    text = help_of(capsys, "train")
    for name, _ in all_settings(Settings):
        assert f"--{name} VALUE" in text
    assert len(re.findall(r"^  --[\w.]+ VALUE", text, re.MULTILINE)) == len(flags_parser()._actions)


def test_command_alone_prints_help(capsys):
    main([])
    assert capsys.readouterr().out == help_of(capsys)


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"codiemb_jax {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tran"], "invalid choice: 'tran'"),
        (["--config", "quickstart"], "required: COMMAND"),
        (["train"], "--config is required"),
        (["train", "--conf", "quickstart"], "unrecognized arguments: --conf quickstart$"),
        (["train", "mine.yaml"], "unrecognized arguments: mine.yaml; to use a settings file, give --config mine.yaml"),
        (
            ["train", "--config", "quickstart", "--optimizer.learning_rat", "1e-4"],
            "--optimizer.learning_rat 1e-4; did you mean optimizer.learning_rate\\?",
        ),
        (["train", "--config", "quickstart", "--output_dir", "s3://b/run"], "this address is not supported"),
        (["train", "--config", "quickstart", "--output_dir", "gs://B/run"], "gs://B/run is not a valid address"),
        (["hf-to-orbax", "--model", "s3://bucket/model", "--output", "x"], "this address is not supported"),
        (["hf-to-orbax", "--model", "x", "--output", "gs://bucket/x"], "--output: gs://bucket/x: this address is"),
        (["orbax-to-hf", "--checkpoint", "gs:/bucket", "--output", "x"], "--checkpoint: gs:/bucket: this address"),
        (
            ["train", "--config", "quickstrat"],
            "quickstrat: cannot be read: .*; configurations of this package: ",
        ),
        (["hf-to-orbax", "--output", "x"], "required: --model"),
    ],
)
def test_invalid_arguments_raise_user_error(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(arguments)
    assert not list(tmp_path.iterdir())


def test_a_file_takes_precedence_over_a_configuration_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart") == PACKAGE / "configs" / "quickstart.yaml"
    Path("quickstart").write_text("")
    assert find_config("quickstart") == Path("quickstart")
    assert find_config("other.yaml") == Path("other.yaml")


def test_link_without_target_takes_precedence_over_a_configuration_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart").symlink_to("absent.yaml")
    assert find_config("quickstart") == Path("quickstart")


def test_named_pipe_as_config_raises_user_error(tmp_path):
    os.mkfifo(tmp_path / "settings.yaml")
    with pytest.raises(UserError, match=r"settings.yaml: is not a file"):
        load_settings(tmp_path / "settings.yaml")


def test_folder_does_not_hide_a_config_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart").mkdir()
    assert find_config("quickstart") == PACKAGE / "configs" / "quickstart.yaml"


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret", "quickstart/../../secret"])
def test_package_paths_stay_inside_the_package(path, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"output_dir: run\nmodel: {{path: m}}\ndata: {{ir: 'package://{path}'}}\n")
    with pytest.raises(UserError, match="package:// paths must stay inside the package"):
        load_settings(settings)


def test_every_config_file_has_a_name():
    assert CONFIGS.keys() == {path.stem for path in (PACKAGE.parent / "configs").glob("*.yaml")}


def test_quickstart_reads_only_package_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = load_settings(find_config("quickstart"))
    paths = [*settings.data.ir, *settings.data.sts, *settings.evaluation.ir, *settings.evaluation.sts]
    for path in [Path(settings.model.path), *paths]:
        assert path.is_relative_to(PACKAGE / "quickstart")
        assert path.is_dir()
    assert settings.output_dir == Path("runs/quickstart")


def test_output_is_never_written_into_the_package(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("output_dir: package://run\nmodel: {path: m}\ndata: {ir: d}\n")
    with pytest.raises(UserError, match="settings.yaml:1: output_dir: package:// is only for input files"):
        load_settings(path)
