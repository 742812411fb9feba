"""The command line: what loads, what is printed where, exit codes, and what a second run does."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from dpo_cli.cli import app
from dpo_cli.errors import DpoError
from dpo_cli.job import RUNS, Job, reported, several
from dpo_cli.recipe import load
from typer.testing import CliRunner, Result

Cli = Callable[..., subprocess.CompletedProcess[str]]
Invoke = Callable[..., Result]

COMMANDS = ["prepare", "train", "eval", "export", "init", "check", "doctor", "schema"]

# Runs the program as its console script does, then says on stderr which heavy libraries it has loaded.
LOADED = """
import sys
from dpo_cli.cli import main
heavy = {"torch", "transformers", "trl", "peft", "datasets", "unsloth", "numpy", "accelerate", "bitsandbytes"}
try:
    main()
except SystemExit as end:
    code = end.code
print("loaded:", *sorted(heavy & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        *((one, "free some disk space") for one in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
        *((one, "check who may write there") for one in (errno.EACCES, errno.EPERM, errno.EROFS)),
    ],
)
def test_what_a_file_system_refuses_has_a_fix(number: int, fix: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, reported(debug=False):
        raise OSError(number, os.strerror(number), "runs/demo")
    said = capsys.readouterr().err
    assert caught.value.exit_code == 1 and fix in said and "where: runs/demo" in said


def test_a_folder_or_glob_names_what_is_in_it_but_for_the_commands_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "other"):
        Path(f"{name}.yaml").write_text("model: {id: builtin:tiny-qwen3}\ndata: {sources: builtin:style-helpsteer2}\n")
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "recipe.yaml").touch()
    Path("runs", "empty").mkdir()
    job = Job.open(Path("mine.yaml"), [], RUNS, force=False, quiet=True)
    assert several([RUNS, Path("*.y*ml")], job) == [Path("runs/other"), Path("other.yaml")]
    assert several([Path("mine.yaml")], job) == [Path("mine.yaml")]
    with pytest.raises(DpoError, match="no recipe or run is called none"):
        several([Path("none*")], job)


@pytest.fixture
def invoke() -> Invoke:
    """`invoke("check", path)`: the app in this process, where exit codes and streams are the same and torch is not."""
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


# ------------------------------------------------------------------------------------------------------ what it loads


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("--help", 0), ("--version", 0), ("train --help", 0), ("schema", 0), ("check demo.yaml", 0),
        ("check demo.yaml --set train.betta=1", 2), ("prepare demo.yaml", 0),
    ],
)  # fmt: skip
def test_light_commands_load_no_torch(project: Any, dpo_cli: Cli, arguments: str, code: int) -> None:
    if arguments.startswith("prepare"):
        dpo_cli("prepare", "demo.yaml")  # a finished one has nothing to do
    command = [sys.executable, "-c", LOADED, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stderr.endswith("loaded:\n") and ("did you mean beta?" in done.stderr) == bool(code)
    assert bool(done.stdout) == (code == 0)


# -------------------------------------------------------------------------------------------------- what it prints


def test_help_names_every_command(invoke: Invoke) -> None:
    shown = invoke("--help")
    assert shown.exit_code == 0
    for command in COMMANDS:
        assert f"  {command} " in shown.stdout


@pytest.mark.parametrize("command", ["prepare", "train", "eval", "export"])
def test_recipe_commands_share_their_options(invoke: Invoke, command: str) -> None:
    shown = invoke(command, "--help").stdout
    for option in ("RECIPE", "--set", "--runs-dir", "--force", "--quiet", "--debug"):
        assert option in shown


def test_python_m_is_the_same_program(project: Any, dpo_cli: Cli) -> None:
    script = subprocess.run([Path(sys.executable).with_name("dpo-cli"), "--help"], capture_output=True, text=True)
    module = dpo_cli("--help")
    assert (module.returncode, script.returncode) == (0, 0)
    assert module.stdout.splitlines()[3:] == script.stdout.splitlines()[3:]  # the usage line names the program


def test_check_prints_a_recipe_that_loads(project: Any, invoke: Invoke) -> None:
    done = invoke("check", project.recipe, "--all", "--set", "train.learning_rate=5e-6")
    assert (done.exit_code, done.stderr) == (0, "")
    again = project.folder / "again.yaml"
    again.write_text(done.stdout, encoding="utf-8")
    assert load(again).model_dump() == load(project.recipe, ["train.learning_rate=5e-6"]).model_dump()
    assert yaml.safe_load(done.stdout)["train"]["learning_rate"] == 5e-6


def test_check_says_ok_and_what_will_happen(project: Any, invoke: Invoke) -> None:
    done = invoke("check", project.recipe, "--set", "train.learning_rate=5e-6")
    first, *lines, last = done.stdout.splitlines()
    assert first == f"ok: {project.recipe}"
    assert [line.split()[0] for line in lines] == ["data", "model", "train", "eval", "export", "run"]
    assert "learning rate 5e-06" in done.stdout
    assert last == f"next: dpo-cli prepare {project.recipe} --set train.learning_rate=5e-6"
    assert not project.run.exists()


@pytest.mark.parametrize("command", [[], ["train"], ["init"], ["doctor"], ["schema"]])
def test_short_help_is_help_with_an_example(invoke: Invoke, command: list[str]) -> None:
    short, long = invoke(*command, "-h"), invoke(*command, "--help")
    assert (short.exit_code, short.stdout) == (0, long.stdout)
    assert "dpo-cli " in short.stdout.rstrip().splitlines()[-1]


def test_output_cut_off_by_the_reader_is_no_error(project: Any) -> None:
    """`dpo-cli check … | head`: the reader goes before anything is written."""
    with subprocess.Popen(
        [sys.executable, "-m", "dpo_cli", "check", "demo.yaml"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""


def test_quiet_prints_nothing(project: Any, dpo_cli: Cli) -> None:
    for _ in range(2):
        done = dpo_cli("prepare", "demo.yaml", "--quiet")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (project.run / "data" / "train.jsonl").is_file()


def test_prepare_says_what_it_made_and_where(project: Any, dpo_cli: Cli) -> None:
    done = dpo_cli("prepare", "demo.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    rows = len((project.run / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines())
    *_, made, following = done.stdout.splitlines()
    assert made.startswith(f"prepare: {rows} training pairs") and "runs/demo/data" in made
    assert following == "next: dpo-cli train demo.yaml"


def test_prepare_again_has_nothing_to_do_unless_something_it_reads_has_changed(project: Any, invoke: Invoke) -> None:
    invoke("prepare", project.recipe)
    before = {path: path.stat().st_mtime_ns for path in project.run.rglob("*") if path.name != ".lock"}
    again = invoke("prepare", project.recipe)
    assert again.exit_code == 0
    assert "nothing to do" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in project.run.rglob("*") if path.name != ".lock"} == before
    assert "nothing to do" in invoke("prepare", project.recipe, "--set", "train.beta=0.5").stdout
    for other in (["--set", "seed=7"], ["--force"]):
        assert "nothing to do" not in invoke("prepare", project.recipe, *other).stdout
    project.write_rows(60, seed=1)
    assert "nothing to do" not in invoke("prepare", project.recipe).stdout


def test_runs_dir_and_name_choose_the_folder(project: Any, invoke: Invoke) -> None:
    assert invoke("prepare", project.recipe, "--runs-dir", "else/where", "--set", "name=其他").exit_code == 0
    assert (project.folder / "else" / "where" / "其他" / "data" / "train.jsonl").is_file()
    assert not (project.folder / "runs").exists()


def test_the_run_is_told_the_same_recipe_wherever_it_is_started(
    project: Any, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    invoke("prepare", "demo.yaml")
    (project.folder / "sub").mkdir()
    monkeypatch.chdir(project.folder / "sub")
    assert "nothing to do" in invoke("prepare", "../demo.yaml", "--runs-dir", "../runs").stdout


# -------------------------------------------------------------------------------------------------------- exit codes


def assert_one_block(done: Result, code: int, *parts: str) -> None:
    """Nothing on stdout, and one short block on stderr with all of `parts`."""
    assert (done.exit_code, done.stdout) == (code, ""), done.output
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 8
    for part in parts:
        assert part in done.stderr


@pytest.mark.parametrize("command", ["eval", "export"])
def test_the_command_that_mends_mends_this_run(project: Any, invoke: Invoke, command: str) -> None:
    """Typed as shown, it has to lead to the run that was asked for."""
    done = invoke(command, "demo.yaml", "--runs-dir", "else", "--set", "name=other", "--set", "train.beta=0.2")
    assert_one_block(
        done,
        1,
        "train has not been run",
        "dpo-cli train demo.yaml",
        "--runs-dir else",
        "--set name=other",
        "--set train.beta=0.2",
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and /sys")
@pytest.mark.parametrize(
    ("command", "folder"),
    [
        ("prepare", "/proc/x"), ("eval", "/dev/null"), ("prepare", "a-file/deeper"), ("train", "n" * 300),
    ],
    ids=lambda one: one[:9],
)  # fmt: skip
def test_a_runs_folder_that_can_not_be(project: Any, invoke: Invoke, command: str, folder: str) -> None:
    (project.folder / "a-file").write_text("x", encoding="utf-8")
    done = invoke(command, "demo.yaml", "--runs-dir", folder)
    assert_one_block(done, 1, f"can't write to {folder[:200]}", "choose another folder with --runs-dir")


@pytest.mark.parametrize("command", ["prepare", "train", "eval", "export", "check"])
def test_a_wrong_recipe_exits_2_in_every_command(project: Any, invoke: Invoke, command: str) -> None:
    done = invoke(command, "demo.yaml", "--set", "train.betta=0.2")
    assert_one_block(done, 2, "train.betta", "did you mean beta?")
    assert not project.run.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["prepair", "demo.yaml"],
        ["prepare"],
        ["prepare", "demo.yaml", "--nope"],
        ["prepare", "demo.yaml", "--preview", "x"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2_on_stderr(project: Any, invoke: Invoke, arguments: list[str]) -> None:
    done = invoke(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.stderr


def test_real_exit_codes_and_streams(project: Any, dpo_cli: Cli) -> None:
    """The same through a real process."""
    for arguments, code in (
        (["check", "demo.yaml"], 0),
        (["eval", "demo.yaml"], 1),
        (["check", "demo.yaml", "--set", "seed=x"], 2),
    ):
        done = dpo_cli(*arguments)
        assert done.returncode == code
        assert bool(done.stdout) == (code == 0)
        assert done.stderr.startswith("error: ") == (code != 0)
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["check", "nowhere.yaml"], ["eval", "demo.yaml"]], ids=" ".join)
def test_debug_shows_the_traceback(project: Any, invoke: Invoke, arguments: list[str]) -> None:
    plain, debug = invoke(*arguments), invoke(*arguments, "--debug")
    assert "Traceback" not in plain.stderr
    assert "Traceback (most recent call last)" in debug.stderr
    assert debug.stderr.endswith(plain.stderr)
    assert debug.exit_code == plain.exit_code


def test_preview_shows_pairs_as_the_model_sees_them(project: Any, invoke: Invoke) -> None:
    settings = ["--set", "model.id=builtin:tiny-qwen3", "--set", "model.load_in_4bit=false"]
    done = invoke("prepare", project.recipe, *settings, "--preview", "1")
    assert done.exit_code == 0, done.output
    first = json.loads((project.run / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert "<|im_start|>" in done.stdout
    assert first["chosen"][0]["content"].split()[0] in done.stdout


def test_memory_that_runs_out_anywhere_is_said_in_words(
    project: Any, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("dpo_cli.cli.recipe.check", full)
    done = invoke("check", project.recipe)
    assert done.exit_code == 1
    assert "error: memory ran out: CUDA out of memory. Tried" in done.stderr and "nvidia-smi" in done.stderr
