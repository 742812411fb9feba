"""A run's folder: results are complete or absent, whatever happens; and what is stale says why."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen
from types import SimpleNamespace
from typing import Any

import pytest
from dpo_cli import processes
from dpo_cli.cli import app
from dpo_cli.disk import LARGE, aside, remove, sha256
from dpo_cli.errors import FAILED, DpoError
from dpo_cli.prepare.sources import source_files as prepare_files
from dpo_cli.recipe import Recipe, load
from dpo_cli.recipe.reads import recipe_keys
from dpo_cli.run import Run
from tests import program
from typer.testing import CliRunner

Spawn = Callable[..., Popen[str]]

RECIPE = """\
model: {id: ./weights}
data:
  sources: [{id: rows.jsonl, layout: pairs}]
  contamination: [asked.txt]
"""


def source_files(recipe: Recipe) -> dict[str, Path]:
    paths = [source.id for source in recipe.data.sources] + recipe.data.contamination
    return {Path(path).name: Path(path) for path in paths}


def weight_files(recipe: Recipe) -> dict[str, Path]:
    return {f"model/{path.name}": path for path in sorted(Path(recipe.model.id).iterdir())}


def why(run: Run, stage: str, recipe: Recipe) -> list[str]:
    """Why a stage is not fresh, each reason once."""
    return list(dict.fromkeys(reason.text for reason in run.stale(stage, recipe)))


class Home:
    """A recipe with its files and run in one folder, and stand-ins for the stages that write a file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def made(cls, folder: Path) -> Home:
        (folder / "weights").mkdir(parents=True)
        (folder / "demo.yaml").write_text(RECIPE, encoding="utf-8")
        (folder / "rows.jsonl").write_text("{}\n", encoding="utf-8")
        (folder / "asked.txt").write_text("one\n", encoding="utf-8")
        for name in ("model.bin", "other.bin"):
            (folder / "weights" / name).write_bytes(b"weights")
        return cls(folder)

    def recipe(self, *overrides: str) -> Recipe:
        return load(self.folder / "demo.yaml", list(overrides))

    @property
    def run(self) -> Run:
        return Run(self.folder / "runs" / "demo", {"prepare": source_files, "train": weight_files})

    def go(self, stage: str, *overrides: str, text: str = "made") -> None:
        recipe = self.recipe(*overrides)
        with self.run.lock(), self.run.stage(stage, recipe) as draft:
            for name in OUTPUTS[stage]:
                path = draft.folder / name
                path.parent.mkdir(exist_ok=True)
                path.write_text(f"{text} {name}\n", encoding="utf-8")

    def go_all(self) -> None:
        for stage in OUTPUTS:
            self.go(stage)

    def reasons(self, stage: str, *overrides: str) -> list[str]:
        return why(self.run, stage, self.recipe(*overrides))

    def fresh(self) -> list[str]:
        return [stage for stage in OUTPUTS if self.run.fresh(stage, self.recipe())]


OUTPUTS = {
    "prepare": ["train.jsonl", "eval.jsonl", "report.json"],
    "train": ["adapter/weights.bin", "metrics.json"],
    "eval": ["metrics.json"],
    "export": ["verify.json"],
}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.made(tmp_path / "home")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------------ complete or absent


def test_results_are_there_once_the_stage_is_left(home: Home) -> None:
    run = home.run
    with run.stage("prepare", home.recipe()) as draft:
        (draft.folder / "train.jsonl").write_text("x", encoding="utf-8")
        assert not run["prepare"].exists()
        assert run.record("prepare") == {}
    assert files(run["prepare"]) == {"train.jsonl": b"x"}
    record = run.record("prepare")
    assert record["status"] == "complete"
    assert list(record["outputs"]) == ["data/train.jsonl"]
    assert record["seed"] == 42
    assert record["seconds"] >= 0
    assert "python" in record["versions"]
    assert sorted(path.name for path in run.folder.iterdir()) == ["data", "manifest.json", "recipe.yaml"]


def test_the_resolved_recipe_lies_in_the_run_and_loads(home: Home) -> None:
    home.go("prepare", "train.beta=0.3")
    again = load(home.run.folder / "recipe.yaml")
    assert again.model_dump() == home.recipe("train.beta=0.3").model_dump()


@pytest.mark.parametrize("problem", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("stage", OUTPUTS)
def test_a_stage_left_by_an_exception_leaves_nothing(home: Home, stage: str, problem: BaseException) -> None:
    home.go_all()
    before = files(home.run.folder)
    with pytest.raises(type(problem)), home.run.stage(stage, home.recipe()) as draft:
        (draft.folder / "half").write_text("x", encoding="utf-8")
        raise problem
    assert files(home.run.folder) == before
    assert home.fresh() == list(OUTPUTS)


def test_new_results_replace_all_of_the_old(home: Home) -> None:
    with home.run.stage("prepare", home.recipe()) as draft:
        (draft.folder / "dropped.jsonl").write_text("x", encoding="utf-8")
    home.go("prepare")
    assert sorted(files(home.run["prepare"])) == ["eval.jsonl", "report.json", "train.jsonl"]


def test_train_keeps_its_checkpoints_and_log(home: Home) -> None:
    home.go("prepare")
    live = home.run.checkpoints / "checkpoint-1"
    live.mkdir(parents=True)
    (live / "state").write_text("x", encoding="utf-8")
    (home.run["train"] / "log.jsonl").write_text("{}\n", encoding="utf-8")
    (home.run.adapter).mkdir()
    (home.run.adapter / "stale.bin").write_text("old", encoding="utf-8")
    home.go("train")
    assert sorted(files(home.run["train"])) == [
        "adapter/weights.bin", "checkpoints/checkpoint-1/state", "log.jsonl", "metrics.json",
    ]  # fmt: skip


def test_the_manifest_is_written_last(home: Home) -> None:
    """Results that can't be put in place are not in it."""
    run = home.run
    run.folder.mkdir(parents=True)
    run["prepare"].write_text("a file where a folder belongs", encoding="utf-8")
    with pytest.raises(OSError):
        home.go("prepare")
    assert run.record("prepare") == {}
    assert not run.fresh("prepare", home.recipe())


def test_the_manifest_keeps_the_other_stages(home: Home) -> None:
    home.go_all()
    before = home.run.record("train")
    home.go("eval")
    assert home.run.record("train") == before
    assert set(home.run.manifest()["stages"]) == set(OUTPUTS)


# --------------------------------------------------------------------------------------------------------- a kill


def test_a_kill_before_the_manifest_does_not_pass_new_results_for_the_old(home: Home) -> None:
    """Killed after the rename: the results are new, the manifest's record is of the old ones."""
    home.go("prepare")
    (home.run.train_pairs).write_text("new\n", encoding="utf-8")
    old = home.run.folder / ".data.old"
    shutil.copytree(home.run["prepare"], old)
    with home.run.lock():
        assert home.run.train_pairs.read_text(encoding="utf-8") == "new\n"
        assert not home.run.fresh("prepare", home.recipe())
    home.go("prepare")
    assert home.run.fresh("prepare", home.recipe())
    assert not old.exists()


def test_a_stage_that_was_cut_short_says_so(home: Home) -> None:
    home.go("prepare")
    home.run.write_record("train", home.recipe(), home.run.started("train", home.recipe()))
    assert home.reasons("train") == ["train was cut short"]


HOLD = """
import sys
from pathlib import Path
from dpo_cli.run import Run
with Run(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_on_the_same_run_is_refused(home: Home, spawn: Spawn) -> None:
    home.go("prepare")
    process = spawn("-c", HOLD, home.run.folder)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(DpoError, match="another dpo-cli is working on this run") as caught, home.run.lock():
        pass
    assert caught.value.exit_code == FAILED
    assert str(home.run.folder) in str(caught.value)
    with Run(home.folder / "runs" / "other").lock():
        pass  # another run is free
    process.kill()
    process.wait()
    with home.run.lock():
        pass  # and this one is free again, though its owner was killed


# ---------------------------------------------------------------------------------------- leftovers, links, own files


def test_answers_that_stand_in_the_results_go_and_others_stay(home: Home) -> None:
    home.go_all()
    record = home.run.record("eval") | {"samples": "f" * 64}
    home.run.write_record("eval", home.recipe(), record)
    work = home.run.folder / ".eval"
    for name, stays in ((f"samples-{'a' * 16}.jsonl", True), (f"samples-{'f' * 16}.jsonl", False)):
        work.mkdir(exist_ok=True)
        (work / name).write_text("{}", encoding="utf-8")
        with home.run.lock():
            assert work.exists() is stays


def test_what_a_kill_left_half_made_goes(home: Home) -> None:
    home.go_all()
    before = files(home.run.folder)
    aside(home.run.folder / "manifest.json", "new").write_text("{", encoding="utf-8")
    for path in (home.run["eval"], home.run.adapter):
        left = aside(path, "new")
        left.mkdir()
        (left / "half.json").write_text("{", encoding="utf-8")
    with home.run.lock():
        assert files(home.run.folder) == before


@pytest.mark.parametrize("dangling", [True, False])
@pytest.mark.parametrize("stage", OUTPUTS)
def test_a_linked_folder_is_filled_anew_and_stays_a_link(
    home: Home, tmp_path: Path, stage: str, dangling: bool
) -> None:
    home.go_all()
    link, disk = home.run[stage], tmp_path / "disk" / "big"
    disk.parent.mkdir()
    shutil.move(link, disk)
    link.symlink_to(disk)
    if dangling:
        shutil.rmtree(disk.parent)
    for text in ("second", "third"):
        home.go(stage, text=text)
        assert link.is_symlink()
        assert files(disk) == files(link)
        assert all(content.startswith(text.encode()) for content in files(disk).values())
    assert [path.name for path in disk.parent.iterdir()] == ["big"]
    assert home.run.record(stage)["outputs"]
    # A kill between the two renames, on the other disk.
    if stage != "train":
        disk.rename(disk.with_name(".big.old"))
        with home.run.lock():
            assert files(disk) == files(link) != {}


def test_a_linked_adapter_is_replaced_where_it_lies(home: Home, tmp_path: Path) -> None:
    home.go_all()
    shutil.move(home.run.adapter, tmp_path / "adapter")
    home.run.adapter.symlink_to(tmp_path / "adapter")
    home.go("train", text="anew")
    assert home.run.adapter.is_symlink()
    assert (tmp_path / "adapter" / "weights.bin").read_bytes().startswith(b"anew")
    assert home.run.fresh("train", home.recipe())


@pytest.mark.parametrize("stage", OUTPUTS)
def test_a_persons_own_files_stay_among_new_results(home: Home, stage: str) -> None:
    home.go_all()
    folder = home.run.adapter if stage == "train" else home.run[stage]
    (folder / "notes").mkdir()
    (folder / "notes" / "读我.md").write_text("mine", encoding="utf-8")
    (folder / "link").symlink_to("nowhere")
    for text in ("second", "third"):
        home.go(stage, text=text)
        assert (folder / "notes" / "读我.md").read_text(encoding="utf-8") == "mine"
        assert (folder / "link").is_symlink()
    assert not [name for name in home.run.record(stage)["outputs"] if "notes" in name or "link" in name]
    assert home.reasons(stage) == []


def test_a_record_is_forgotten_alone(home: Home) -> None:
    home.go_all()
    home.run.forget("train")
    assert set(home.run.manifest()["stages"]) == {"prepare", "eval", "export"}
    assert home.reasons("train") == ["train has not been run"]


def test_an_evaluation_says_which_gpu_it_ran_on(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch on a machine with a card; `prepare` runs beside it."""
    home.go_all()
    card = SimpleNamespace(is_available=lambda: True, get_device_name=lambda: "NVIDIA T4")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=card))
    assert home.run.started("eval", home.recipe())["device"] == "NVIDIA T4"
    assert home.run.started("prepare", home.recipe())["device"] != "NVIDIA T4"
    card.is_available = lambda: False
    assert home.run.started("eval", home.recipe())["device"] == home.run.record("prepare")["device"]


def test_prepare_says_whose_pairs_it_replaced(project: Any, dpo_cli: Callable[..., Any]) -> None:
    assert "other pairs" not in dpo_cli("prepare", project.recipe).stdout
    run, recipe = Run(project.run), load(project.recipe)
    with run.stage("train", recipe) as draft:
        (draft.folder / "metrics.json").write_text("{}", encoding="utf-8")
    assert "other pairs" not in dpo_cli("prepare", project.recipe, "--force").stdout
    project.write_rows(30, seed=1)
    assert "was trained on other pairs than these" in dpo_cli("prepare", project.recipe).stdout


# ------------------------------------------------------------------------------------------------------ hanging up

HANG_UP = """
import sys, time
from pathlib import Path
from dpo_cli.train.progress import StopAfterStep
stop = StopAfterStep()
with stop:
    print("ready", flush=True)
    while not stop.asked:
        time.sleep(0.01)
print("saving the step at hand", flush=True)
print("interrupted", file=sys.stderr, flush=True)
Path(sys.argv[1]).write_text("saved")
"""


@pytest.fixture
def hang_up() -> Iterator[None]:
    """SIGHUP as a terminal sets it up, also where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hang_up")
def test_a_terminal_that_closes_is_ctrl_c_and_what_is_printed_then_costs_nothing(tmp_path: Path) -> None:
    main, terminal = pty.openpty()
    process = program.python("-c", HANG_UP, tmp_path / "saved", stdout=terminal, stderr=terminal)
    os.close(terminal)
    printed = b""
    while not re.search(rb"^ready", printed, re.MULTILINE):  # libraries may speak before
        printed += os.read(main, 100)
    os.close(main)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    assert (tmp_path / "saved").read_text() == "saved"


@pytest.mark.usefixtures("hang_up")
def test_nohup_keeps_a_hang_up_from_stopping_anything() -> None:
    assert signal.SIGHUP in processes.stop_signals()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert signal.SIGHUP not in processes.stop_signals()


# ------------------------------------------------------------------------------------------------ a broken manifest


@pytest.mark.parametrize("text", ["", "[]", '{"stages": []}', '{"stages": {"prepare": 3}}', "\udcff"])
def test_a_broken_manifest_is_a_clear_error(home: Home, text: str) -> None:
    home.go("prepare")
    path = home.run.folder / "manifest.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DpoError) as caught:
        home.reasons("prepare")
    assert str(path) in str(caught.value)
    assert caught.value.hint


# ----------------------------------------------------------------------------------------------------- stale and why


@pytest.mark.parametrize(
    ("setting", "stale", "reason"),
    [
        ("seed=7", "prepare train eval export", "seed is 7, was 42"),
        ("data.total=10", "prepare train eval export", "data.total is 10, was null"),
        ("data.sources.0.quota=3", "prepare train eval export", "data.sources[0].quota is 3, was null"),
        ("model.max_length=99", "prepare train eval export", "model.max_length is 99, was 1024"),
        ("train.beta=0.5", "train eval export", "train.beta is 0.5, was 0.1"),
        ("lora.r=8", "train eval export", "lora.r is 8, was 32"),
        ("model.load_in_4bit=false", "train eval export", "model.load_in_4bit is false, was true"),
        ("eval.prompts=3", "eval", "eval.prompts is 3, was 200"),
        *((f"eval.{name}=1", "eval export", f"eval.{name} is 1") for name in ("temperature", "top_p", "top_k")),
        ("export.formats=[adapter]", "export", "export.formats"),
        ("model.merge_base=Qwen/Qwen3-1.7B", "export", "model.merge_base"),
    ],
)
def test_a_changed_key_makes_its_readers_stale(home: Home, setting: str, stale: str, reason: str) -> None:
    home.go_all()
    found = {stage: home.reasons(stage, setting) for stage in OUTPUTS}
    assert [stage for stage, reasons in found.items() if reasons] == stale.split()
    for stage in stale.split():
        assert any(reason in one for one in found[stage]), found[stage]


def test_a_new_name_or_an_explicit_default_changes_nothing(home: Home) -> None:
    home.go_all()
    same = ("train.beta=0.1", "lora.alpha=64", "lora.alpha=64.0", "train.num_train_epochs=1", "data.total=null")
    for setting in same:
        assert home.run.fresh("eval", home.recipe(setting)), setting


def test_auto_targets_are_those_that_were_trained(home: Home) -> None:
    """A run may be copied to where its model is not, whose config would say what auto means."""
    trained = "lora.target_modules=[q_proj]"
    for stage in OUTPUTS:
        home.go(stage, trained)
    assert home.run.fresh("export", home.recipe("lora.target_modules=auto"))
    assert not home.run.fresh("export", home.recipe("lora.target_modules=[k_proj]"))


def change_source(home: Home) -> None:
    (home.folder / "rows.jsonl").write_text("{}\n{}\n", encoding="utf-8")


def edit_output(home: Home) -> None:
    with open(home.run.train_pairs, "a", encoding="utf-8") as file:
        file.write("one more\n")


def delete_output(home: Home) -> None:
    home.run.eval_pairs.unlink()


def change_weights(home: Home) -> None:
    (home.folder / "weights" / "model.bin").write_bytes(b"other")


def add_weights(home: Home) -> None:
    (home.folder / "weights" / "new.bin").write_bytes(b"more")


def delete_weights(home: Home) -> None:
    (home.folder / "weights" / "other.bin").unlink()


def edit_adapter(home: Home) -> None:
    (home.run.adapter / "weights.bin").write_bytes(b"other")


@pytest.mark.parametrize(
    ("change", "stale", "reason"),
    [
        (change_source, "prepare train eval export", "rows.jsonl has changed"),
        (edit_output, "prepare train eval export", "data/train.jsonl has been changed since prepare wrote it"),
        (delete_output, "prepare train eval export", "data/eval.jsonl is missing"),
        (change_weights, "train eval export", "model/model.bin has changed"),
        (add_weights, "train eval export", "model/new.bin has changed"),
        (delete_weights, "train eval export", "model/other.bin is gone"),
        (edit_adapter, "train eval export", "train/adapter/weights.bin has been changed since train wrote it"),
    ],
)
def test_changed_files_make_their_readers_stale(
    home: Home, change: Callable[[Home], None], stale: str, reason: str
) -> None:
    home.go_all()
    change(home)
    found = {stage: home.reasons(stage) for stage in OUTPUTS}
    assert [stage for stage, reasons in found.items() if reasons] == stale.split()
    for stage in stale.split():
        assert reason in found[stage]


def test_a_stage_made_anew_makes_the_later_ones_stale(home: Home) -> None:
    home.go_all()
    change_source(home)
    home.go("prepare", text="anew")
    assert home.fresh() == ["prepare"]
    assert any("data/train.jsonl" in reason for reason in home.reasons("train"))
    home.go("train", text="anew")
    assert home.fresh() == ["prepare", "train"]
    assert any("train/adapter/weights.bin" in reason for reason in home.reasons("eval"))
    home.go("eval")
    home.go("export")
    assert home.fresh() == list(OUTPUTS)


def test_test_sets_made_anew_make_an_evaluation_stale(home: Home) -> None:
    """As where a kill came between the two."""
    sets = "eval.sets=[{id: asked.jsonl}]"

    def read(text: str) -> None:
        with home.run.stage("sets", home.recipe(sets)) as draft:
            (draft.folder / "pairs.jsonl").write_text(text, encoding="utf-8")

    home.go("prepare")
    home.go("train")
    read("one")
    home.go("eval", sets)
    assert home.reasons("eval", sets) == []
    read("two")
    assert home.reasons("eval", sets) == ["sets/pairs.jsonl has changed"]


def test_where_the_model_answers_prepare_reads_how_it_is_loaded(home: Home) -> None:
    """Its adapter and its dtype decide the answers; what a merge starts from does not."""
    rater = "data.rater={kind: reward_model, id: builtin:style-reward}"
    sampled = recipe_keys(home.recipe("data.sources=[{id: rows.jsonl, sample: {}}]", rater), "prepare")
    keys = {"model.adapter", "model.adapter_revision", "model.dtype", "model.load_in_4bit"}
    assert keys < sampled.keys() and "model.merge_base" not in sampled
    assert not keys & recipe_keys(home.recipe(), "prepare").keys()


def test_a_link_is_removed_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "link").symlink_to("checkpoint")
    remove(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_the_same_results_made_anew_stale_nothing(home: Home) -> None:
    """A forced rerun that gives the same bytes must not cost a training run."""
    home.go_all()
    home.go("prepare")
    assert home.fresh() == list(OUTPUTS)


def test_a_slash_in_a_sources_name_keeps_sources_apart(home: Home) -> None:
    """One of two is not on this machine: it is no reason to call the pairs stale."""
    for name in ("one", "two"):
        (home.folder / f"{name}.jsonl").write_text("{}\n", encoding="utf-8")
    ids = (home.folder / "one.jsonl", home.folder / "two.jsonl")
    sources = f"data.sources=[{{name: org/one, id: {ids[0]}}}, {{name: org/two, id: {ids[1]}}}]"
    recipe = home.recipe(sources, "data.contamination=[]")
    run = Run(home.run.folder, {"prepare": lambda one: prepare_files(one, missing_ok=True)})
    with run.stage("prepare", recipe) as draft:
        (draft.folder / "train.jsonl").write_text("x", encoding="utf-8")
    (home.folder / "two.jsonl").unlink()
    assert run.fresh("prepare", recipe)
    (home.folder / "one.jsonl").write_text("{}\n{}\n", encoding="utf-8")
    assert why(run, "prepare", recipe) == ["org:one/one.jsonl has changed"]


def test_sources_that_are_not_on_this_machine_leave_the_results_usable(home: Home) -> None:
    home.go_all()

    def gone(recipe: Recipe) -> dict[str, Path]:
        raise DpoError("no file rows.jsonl")

    run = Run(home.run.folder, {"prepare": gone})
    assert run.fresh("eval", home.recipe())


def test_gigabytes_are_hashed_once_and_a_tampered_file_is_still_noticed(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it keeps its size and the time of its last change."""
    with home.run.stage("prepare", home.recipe()) as draft:
        (draft.folder / "train.jsonl").write_bytes(b"a" * LARGE)

    def unread(path: Path) -> str:
        assert path != home.run.train_pairs, "it is read again"
        return sha256(path)

    with monkeypatch.context() as patch:
        patch.setattr("dpo_cli.run.sha256", unread)
        assert home.run.fresh("prepare", home.recipe())
    before = home.run.train_pairs.stat()
    with open(home.run.train_pairs, "r+b") as file:
        file.write(b"b")
    os.utime(home.run.train_pairs, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert home.run.train_pairs.stat().st_size == before.st_size
    assert home.reasons("prepare") == ["data/train.jsonl has been changed since prepare wrote it"]


# ------------------------------------------------------------------------------------------------------------ moving


def test_a_copied_run_stays_fresh(home: Home, tmp_path: Path) -> None:
    home.go_all()
    shutil.copytree(home.run.folder, tmp_path / "elsewhere" / "copy")
    run = Run(tmp_path / "elsewhere" / "copy", home.run.inputs)
    assert all(run.fresh(stage, home.recipe()) for stage in OUTPUTS)


def test_a_recipe_moved_with_its_sources_and_run_stays_fresh(home: Home, tmp_path: Path) -> None:
    home.go_all()
    shutil.move(home.folder, tmp_path / "another" / "place")
    moved = Home(tmp_path / "another" / "place")
    assert {stage: moved.reasons(stage) for stage in OUTPUTS} == {stage: [] for stage in OUTPUTS}


def test_fingerprints_are_equal_for_equal_recipes_and_data(tmp_path: Path) -> None:
    prints: list[dict[str, Any]] = []
    for name in ("one", "two"):
        home = Home.made(tmp_path / name)
        home.go_all()
        prints.append({stage: home.run.record(stage)["fingerprint"] for stage in OUTPUTS})
    assert prints[0] == prints[1]
    assert len(set(prints[0].values())) == len(OUTPUTS)


# ------------------------------------------------------------------------------------------------------------ refusal


def test_require_names_what_is_missing_or_stale_and_the_command(home: Home) -> None:
    with pytest.raises(DpoError, match="train has not been run") as caught:
        home.run.require("train", home.recipe(), "dpo-cli train demo.yaml")
    assert caught.value.exit_code == FAILED
    assert "dpo-cli train demo.yaml" in str(caught.value)
    home.go_all()
    home.run.require("train", home.recipe(), "x")
    with pytest.raises(DpoError, match=r"stale: train\.beta is 0\.5, was 0\.1") as caught:
        home.run.require("train", home.recipe("train.beta=0.5"), "x")
    assert "run `x --fresh` first, or set again" in str(caught.value.hint)
    with pytest.raises(DpoError, match=r"train\.num_train_epochs is 2\.0, was 1\.0") as caught:
        home.run.require("train", home.recipe("train.num_train_epochs=2.0"), "x")
    assert "run `x` first, or set again" in str(caught.value.hint)  # it goes on


def test_a_source_that_is_gone_hides_no_other_change_and_prepare_says_so(project: Any) -> None:
    """The command: one source edited, another moved away; nothing may call the old pairs up to date."""
    one, two = (project.write_rows(20, seed).rename(f"{name}.jsonl") for seed, name in enumerate(("one", "two")))
    sources = "data.sources=[{id: one.jsonl, layout: pairs}, {id: two.jsonl, layout: pairs}]"

    def run(command: str) -> Any:
        return CliRunner().invoke(app, [command, "demo.yaml", "--set", sources])

    assert run("prepare").exit_code == 0
    two.rename("away.jsonl")
    gone = run("prepare")
    assert gone.exit_code == 1 and "two.jsonl" in gone.stderr
    with open(one, "a", encoding="utf-8") as file:
        file.write('{"prompt": "And what is new?", "chosen": "A new row.", "rejected": "Nothing."}\n')
    assert run("eval").exit_code == 1
    opened = Run(project.run, {"prepare": lambda one: prepare_files(one, missing_ok=True)})
    assert why(opened, "prepare", load(project.recipe, [sources])) == ["one/one.jsonl has changed"]
