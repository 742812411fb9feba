"""The stage as a whole: any set of formats, each verified; what fails leaves what was there before."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import recipe
from dpo_cli import smoke as builtin
from dpo_cli.errors import DpoError
from dpo_cli.export import card, hub
from dpo_cli.export.export import FAILED, export, plan, print_planned
from dpo_cli.export.formats import link
from dpo_cli.export.parity import Check
from dpo_cli.export.upkeep import prune, push, renew_cards
from dpo_cli.run import Run
from tests import mounts, program

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"

Export = Callable[..., list[Check]]


@pytest.fixture
def run(smoke: Any, tmp_path: Path) -> Run:
    """A copy of the finished smoke run, its verified export included."""
    return Run(shutil.copytree(smoke.folder, tmp_path / "runs" / "smoke"))


@pytest.fixture
def export_again(run: Run) -> Export:
    def go(*settings: str) -> list[Check]:
        return export(recipe.load(SMOKE, list(settings)), run, quiet=True)

    return go


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the 16-bit base, to be broken."""
    return shutil.copytree(builtin.resolve("builtin:tiny-qwen3"), tmp_path / "base16")


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files if path.name != ".lock"}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def failed(folder: Path) -> list[str]:
    return [check["name"] for check in read(folder / "verify.json") if not check["ok"]]


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(read(path) | values), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ formats


def test_adapter_and_merged_are_each_verified_in_every_way(smoke: Any) -> None:
    checks = read(smoke.folder / "export" / "verify.json")
    assert all(check.keys() == {"name", "value", "limit", "ok"} and check["ok"] is True for check in checks)
    for kind in ("adapter", "merged"):
        own = {check["name"].partition(".")[2] for check in checks if check["name"].startswith(f"{kind}.")}
        assert {
            "tokenizer_files", "template", "template_tokens_differ", "mean_kl", "top1_agreement", "effect", "carried",
            "greedy_tokens", "answers_not_empty", "answers_ended",
        } <= own  # fmt: skip
    own_weights, trained = (
        smoke.folder / name / "adapter_model.safetensors" for name in ("export/adapter", "train/adapter")
    )
    assert own_weights.read_bytes() == trained.read_bytes(), "the trained adapter alone, whatever it started from"
    for kind in ("adapter", "merged"):
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
            source = builtin.resolve("builtin:tiny-qwen3") / name
            assert (smoke.folder / "export" / kind / name).read_bytes() == source.read_bytes()
        assert (smoke.folder / "export" / kind / "README.md").is_file()


def test_no_published_file_names_a_folder_of_this_machine(smoke: Any) -> None:
    sent = [*hub.contents(smoke.folder / "export", ["adapter", "merged"]).values()]
    sent += [smoke.folder / "eval" / name for name in ("report.md", "report.html")]
    contents = [one if isinstance(one, bytes) else one.read_bytes() for one in sent]
    assert len(contents) > 8
    for private in (str(Path.home()), str(smoke.folder.parent), str(builtin.resolve("builtin:tiny-qwen3").parent)):
        assert not [content[:80] for content in contents if private.encode() in content]


def test_no_login_is_an_error_before_any_work(run: Run, export_again: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("dpo_cli.export.hub.get_token", lambda: None)
    monkeypatch.setattr("dpo_cli.export.base.find", lambda *_, **__: pytest.fail("work has begun"))
    with pytest.raises(DpoError, match="not logged in to the Hub") as raised:
        export_again("export.formats=[adapter,hub]", "export.hub=me/model")
    assert "hf auth login" in str(raised.value.hint)


def test_formats_that_are_added_keep_the_others_until_they_are_pruned(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    made, checks = contents(run["export"]), read(run["export"] / "verify.json")
    made.pop("verify.json")
    added = recipe.load(SMOKE, ["export.formats=[gguf,ollama]"])
    (run.folder / FAILED).mkdir()  # of an earlier one
    export(added, run)
    assert not (run.folder / FAILED).exists() and not renew_cards(added, run)
    assert "kept: adapter, merged" in capsys.readouterr().out
    now = contents(run["export"])
    assert {name: now.get(name) for name in made} == made
    assert {name for name in now if name.startswith("ollama/")} == {
        "ollama/Modelfile", "ollama/README.md", "ollama/smoke-q8_0.gguf",
    }  # fmt: skip
    assert "FROM ./smoke-q8_0.gguf" in (run["export"] / "ollama" / "Modelfile").read_text(encoding="utf-8")
    one, other = (run["export"] / kind / "smoke-q8_0.gguf" for kind in ("gguf", "ollama"))
    assert one.samefile(other), "gigabytes are not written twice"
    together = [check["name"] for check in read(run["export"] / "verify.json")]
    assert {"gguf.mean_kl", "ollama.prompts_differ", *(check["name"] for check in checks)} <= set(together)
    assert len(set(together)) == len(together)
    assert run.fresh("export", added)

    assert prune(added, run) == ["adapter", "merged"] and prune(added, run) == []
    assert {name.partition("/")[0] for name in contents(run["export"])} == {"gguf", "ollama", "verify.json"}
    assert {check["name"].partition(".")[0] for check in read(run["export"] / "verify.json")} == {"gguf", "ollama"}
    assert run.fresh("export", added)


@pytest.mark.parametrize("what", ["changed on disk", "of another adapter", "of another base"])
def test_a_format_that_is_no_longer_what_was_checked_is_not_kept(
    run: Run, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    if what == "changed on disk":
        (run["export"] / "merged" / "config.json").write_text("{}")
    else:
        stages = read(run.folder / "manifest.json")["stages"]
        if what == "of another base":
            stages["export"]["merge_base"]["commit"] = "0" * 40
        else:
            stages["export"]["inputs"] = dict.fromkeys(stages["export"]["inputs"], "0" * 64)
        edit(run.folder / "manifest.json", stages=stages)
    export(recipe.load(SMOKE, ["export.formats=[adapter]"]), run)
    assert "removed: merged" in capsys.readouterr().out
    assert not (run["export"] / "merged").exists()


@pytest.mark.slow
def test_ollama_alone_has_its_weights(run: Run, export_again: Export) -> None:
    pytest.importorskip("gguf")
    export_again("export.formats=[ollama]", "export.gguf=f16")
    prune(recipe.load(SMOKE, ["export.formats=[ollama]", "export.gguf=f16"]), run)
    assert sorted(path.name for path in run["export"].iterdir()) == ["ollama", "verify.json"]
    assert (run["export"] / "ollama" / "smoke-f16.gguf").stat().st_size > 300_000


def test_where_no_second_name_is_possible_a_file_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").write_text("GGUF")
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("exFAT")))
    link(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two").read_text() == "GGUF"


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run.folder)
    loaded = recipe.load(SMOKE, ["export.formats=[adapter,merged,gguf,ollama,hub]", "export.hub=me/smoke"])
    planned = dict(plan(loaded, run))
    assert contents(run.folder) == before
    there = {path.relative_to(run["export"]).as_posix(): path for path in run["export"].rglob("*") if path.is_file()}
    gguf = {"gguf/README.md", "gguf/smoke-q8_0.gguf", "ollama/README.md", "ollama/Modelfile", "ollama/smoke-q8_0.gguf"}
    print_planned(loaded, [*planned.items()])
    assert "hub: me/smoke (private)" in (listed := capsys.readouterr().out) and "verify.json" in listed
    assert planned.keys() == there.keys() - {"verify.json"} | gguf
    for name, path in there.items():
        if path.name not in ("README.md", "verify.json"):
            assert planned[name] == pytest.approx(path.stat().st_size, rel=0.01, abs=3000), name
    expected = planned["merged/model.safetensors"] * 8.5 / 16 + planned["merged/tokenizer.json"] / 2
    assert planned["gguf/smoke-q8_0.gguf"] == pytest.approx(expected, rel=0.01)


def test_neither_a_push_that_fails_nor_an_evaluation_that_comes_later_costs_the_export(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = recipe.load(SMOKE, ["export.formats=[adapter,hub]", "export.hub=me/smoke"])
    manifest, cards = run.folder / "manifest.json", run["export"] / "adapter" / "README.md"
    stages = read(manifest)["stages"]
    edit(manifest, stages={name: record for name, record in stages.items() if name != "eval"})
    monkeypatch.setenv("HF_TOKEN", "hf_one_that_expires")
    export(loaded, run)
    printed = capsys.readouterr().out
    assert "eval has not seen this adapter" in printed and "kept: merged" in printed
    assert "Not evaluated." in cards.read_text(encoding="utf-8") and not renew_cards(loaded, run)

    monkeypatch.delenv("HF_TOKEN")
    pushed = read(manifest)["stages"]["export"] | {"hub": "https://huggingface.co/me/smoke"}  # with the old cards
    edit(manifest, stages=read(manifest)["stages"] | {"eval": stages["eval"], "export": pushed})
    for said in ("in the cards now", ""):  # and is tried again, without exporting again
        with pytest.raises(DpoError, match="not logged in"):
            push(loaded, run)
        assert said in capsys.readouterr().out
        assert run.fresh("export", loaded) and not renew_cards(loaded, run)
    assert read(run.folder / "eval" / "metrics.json")["verdict"]["sentence"] in cards.read_text(encoding="utf-8")
    assert push(recipe.load(SMOKE), run, quiet=True) is None, "where the recipe does not ask for it"
    stages = read(manifest)["stages"]
    edit(manifest, stages=stages | {"export": stages["export"] | {"hub": pushed["hub"]}})
    assert push(loaded, run) is None, "not twice"


# ------------------------------------------------------------------------------------------- what the base may be


def test_weights_of_another_training_as_the_base_are_caught_by_the_gap(
    run: Run, base: Path, export_again: Export
) -> None:
    """Names and shapes fit, as those of Qwen3 base and instruct do."""
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].roll(1, 0)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DpoError, match=r"gap_to_trained\.mean_kl") as raised:
        export_again("export.formats=[adapter]", f"model.merge_base={base}")
    assert raised.value.exit_code == 3


def test_another_training_is_told_from_what_4_bits_lost_by_its_norms(
    run: Run, base: Path, export_again: Export
) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DpoError, match=r"gap_to_4bit\.base_differs is \['model\.norm\.weight'\]") as raised:
        export_again("export.formats=[adapter]", "model.load_in_4bit=true", f"model.merge_base={base}")
    assert raised.value.exit_code == 3


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 1e-5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}]
)
def test_a_merge_base_of_another_config_is_refused_before_any_work(
    run: Run, base: Path, export_again: Export, change: dict[str, Any]
) -> None:
    edit(base / "config.json", **change)
    before = contents(run.folder)
    with pytest.raises(DpoError, match=f"another model than the trained one: {min(change)}") as raised:
        export_again("export.formats=[adapter]", f"model.merge_base={base}")
    assert raised.value.exit_code == 1 and contents(run.folder) == before


def test_weights_that_are_damaged_after_their_checks(
    run: Run, export_again: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = card.write_card

    def write_card(*arguments: Any) -> None:
        with open(arguments[2] / "model.safetensors", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x7f")
        original(*arguments)

    monkeypatch.setattr(card, "write_card", write_card)
    with pytest.raises(DpoError, match=r"merged\.changed_since") as raised:
        export_again("export.formats=[merged]")
    assert raised.value.exit_code == 3


def test_a_16bit_copy_of_the_base_will_do(run: Run, base: Path, export_again: Export) -> None:
    from safetensors.torch import load_file, save_file

    halves = {name: weight.half() for name, weight in load_file(base / "model.safetensors").items()}
    save_file(halves, base / "model.safetensors", metadata={"format": "pt"})
    edit(base / "config.json", dtype="float16")
    done = export_again(f"model.merge_base={base}")
    assert {"gap_to_trained.mean_kl", "merged.dtype"} <= {check["name"] for check in done}
    assert read(run["export"] / "merged" / "config.json")["dtype"] == "float16"
    assert read(run["export"] / "adapter" / "adapter_config.json")["base_model_name_or_path"] == str(base)


def missing(base: Path) -> str:
    shutil.rmtree(base)
    return "can't get the 16-bit base"


def quantised(base: Path) -> str:
    edit(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    return "quantised weights"


def cut_short(base: Path) -> str:
    with open(base / "model.safetensors", "r+b") as file:
        file.truncate(100_000)
    return "can't get the 16-bit base .*: model.safetensors: "


def of_other_sizes(base: Path) -> str:
    from safetensors.torch import load_file, save_file

    weights = {name: weight for name, weight in load_file(base / "model.safetensors").items() if ".1." not in name}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return "another model than the 16-bit base"


@pytest.mark.parametrize("spoil", [missing, quantised, cut_short, of_other_sizes])
def test_a_base_that_will_not_do_is_refused_and_nothing_is_touched(
    run: Run, base: Path, export_again: Export, spoil: Callable[[Path], str]
) -> None:
    said, before = spoil(base), contents(run.folder)
    with pytest.raises(DpoError, match=said) as raised:
        export_again(f"model.merge_base={base}")
    assert raised.value.exit_code == 1 and raised.value.where and raised.value.hint
    assert contents(run.folder) == before


def test_a_base_that_is_not_here_and_no_network(run: Run, export_again: Export) -> None:
    before = contents(run.folder)
    with pytest.raises(DpoError, match="can't get the 16-bit base nobody/none") as raised:
        export_again("model.merge_base=nobody/none")
    assert raised.value.exit_code == 1 and "HF_ENDPOINT" in str(raised.value.hint)
    assert contents(run.folder) == before


# ---------------------------------------------------------------------------------------------- a check that fails


def with_another_tokenizer(base: Path) -> Path:
    tokenizer = read(base / "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["user"], vocabulary["a"] = vocabulary.get("user", vocabulary["u"]), vocabulary["e"]
    vocabulary["e"] = next(number for number in range(len(vocabulary) + 9) if number not in vocabulary.values())
    edit(base / "tokenizer.json", **tokenizer)
    return base


def test_an_export_that_fails_lies_beside_the_one_that_passed(run: Run, base: Path, command: Any) -> None:
    """Exit code 3, every failed check named; and once the base is right again there is nothing left to do."""
    before, setting = contents(run.folder), f"model.merge_base={with_another_tokenizer(base)}"
    done = command("export", SMOKE, "--runs-dir", run.folder.parent, "--set", setting, ok=False)
    assert done.returncode == 3, done.stderr
    assert "merged.template_tokens_differ" in done.stderr and f"{FAILED}/verify.json" in done.stderr
    assert "export is as it was" in " ".join(done.stderr.split())
    assert "merged.template_tokens_differ" in failed(run.folder / FAILED)
    assert (run.folder / FAILED / "merged" / "model.safetensors").is_file(), "for a look"
    after = contents(run.folder)
    assert {name: after[name] for name in before} == before
    assert not run.fresh("export", recipe.load(SMOKE, [setting])), "it is not skipped as done"
    assert run.fresh("export", recipe.load(SMOKE))


# --------------------------------------------------------------------------------------- interrupted, or out of space


def going(run: Run, spawn: Callable[..., subprocess.Popen[str]]) -> subprocess.Popen[str]:
    """An export in the middle of its work: the adapter is written, the merged model is next."""
    options = ["--force", "--runs-dir", str(run.folder.parent)]
    process = spawn("-m", "dpo_cli", "export", str(SMOKE), *options, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    assert process.stdout
    for line in process.stdout:
        if line.startswith("  adapter"):
            return process
    raise AssertionError(process.communicate()[1])


def test_an_export_that_is_killed_leaves_the_previous_one(
    run: Run, spawn: Callable[..., subprocess.Popen[str]], export_again: Export
) -> None:
    before = contents(run.folder)
    process = going(run, spawn)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    after = contents(run.folder)
    assert {name: after[name] for name in before} == before
    export_again("export.formats=[adapter]")
    assert not [path for path in run.folder.iterdir() if path.name.startswith(".") and path.name != ".lock"]


def test_a_disk_that_fills_up(run: Run, tmp_path: Path) -> None:
    """In the middle of the merged weights, which safetensors writes with errors of its own."""
    disk, after, before = tmp_path / "disk", tmp_path / "after", contents(run.folder)
    disk.mkdir()
    command = ("export", SMOKE, "--force", "--runs-dir", disk)
    done = program.run_python(mounts.SCRIPT, "full", disk, run.folder.parent, after, 500, *command)
    mounts.skip_where_refused(done.returncode)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: No space left on device") and "Traceback" not in done.stderr
    assert "where:" in done.stderr and "fix:   free some disk space" in done.stderr
    assert contents(after / "smoke") == before
