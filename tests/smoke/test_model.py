"""The tiny Qwen3 and the cache that built-ins live in."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.errors import DpoError
from dpo_cli.smoke import BUILTINS, resolve
from dpo_cli.smoke.model import build_tiny_qwen3
from tests.tools.smoke_data import SOURCES, write_source

SAMPLES = (
    "Grow basil on a windowsill.",
    "先备好一只花盆，等土面发白再浇透。",
    "  two spaces,\ttabs\r\nand lines\n\n",
    "emoji 👩‍🌾🏽, accents é ü ñ, عربى, हिन्दी, 한국어, 𠮷野家, \x00 and \u200b",
    "<think>\n\n</think>\n\nAn answer with marks.",
    "",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_qwen3(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("DPO_CLI_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def run(code: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_loads_as_a_small_float32_qwen3_with_tied_embeddings(model: Any) -> None:
    import torch

    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert 100_000 < model.num_parameters() < 400_000
    assert model.config.max_position_embeddings == 8192
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, model.config.vocab_size) and torch.isfinite(logits).all()


def test_every_weight_comes_from_the_file(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    report = loaded[1]
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]


def test_it_stops_at_the_end_of_a_turn_or_of_the_text(model: Any, tokenizer: Any) -> None:
    turn, text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == [turn, text]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (turn, text)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (turn, text)


def test_the_tokenizer_fills_the_vocabulary_and_knows_its_limit(model: Any, tokenizer: Any) -> None:
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == 8192


@pytest.mark.parametrize("text", SAMPLES)
def test_any_text_comes_back_whole(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_is_normalised_to_nfc_as_in_the_real_qwen(tokenizer: Any) -> None:
    decomposed = unicodedata.normalize("NFD", "café")
    assert tokenizer.decode(tokenizer.encode(decomposed)) == "café"


def test_each_mark_is_one_token_and_only_the_turn_marks_are_skipped(tokenizer: Any) -> None:
    turns, marks = "<|im_start|><|im_end|><|endoftext|>", "<think></think><tool_call></tool_response>"
    assert len(tokenizer.encode(turns + marks)) == 7
    assert tokenizer.decode(tokenizer.encode(turns + marks), skip_special_tokens=True) == marks


def test_the_chat_template_is_trls_own_qwen3(tokenizer: Any) -> None:
    import trl

    shipped = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    assert tokenizer.chat_template == shipped.read_text(encoding="utf-8")
    question = [{"role": "user", "content": "Hi"}]
    plain, quiet = (
        tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
        for thinking in (True, False)
    )
    assert plain == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert quiet == plain + "<think>\n\n</think>\n\n"


def test_answers_are_short_and_length_in_tokens_does_not_give_the_better_one_away(
    tmp_path: Path, tokenizer: Any
) -> None:
    for name in SOURCES:
        path = tmp_path / name
        write_source(name, path)
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if name == "style-helpsteer2":
            keyed = sorted(rows, key=lambda row: row["prompt"])
            prompts = [
                [(row["response"], row["correctness"]) for row in group]
                for _, group in itertools.groupby(keyed, key=lambda row: row["prompt"])
            ]
        else:
            prompts = [
                [(each["response"], int(each["annotations"]["truthfulness"]["Rating"])) for each in row["completions"]]
                for row in rows
            ]
        differences, lengths = [], []
        for answers in prompts:
            ranked = sorted((answer for answer in answers if answer[0]), key=lambda answer: answer[1])
            if len(ranked) > 1 and ranked[0][1] < ranked[-1][1]:
                worst, best = (len(tokenizer.encode(ranked[end][0])) for end in (0, -1))
                differences.append(best - worst)
                lengths += [best, worst]
        longer = sum(difference > 0 for difference in differences) / len(differences)
        ties = sum(difference == 0 for difference in differences) / len(differences)
        assert 0.40 <= longer <= 0.60 and 0.40 <= longer + ties / 2 <= 0.60, name
        lengths.sort()
        assert lengths[len(lengths) // 10] >= 20 and lengths[len(lengths) * 9 // 10] <= 60, name


def test_a_second_build_is_the_same_and_leaves_the_random_state_alone(folder: Path, tmp_path: Path) -> None:
    import torch

    torch.manual_seed(123)
    before = torch.get_rng_state()
    build_tiny_qwen3(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)
    assert digests(tmp_path / "again") == digests(folder)


def test_building_prints_nothing(tmp_path: Path) -> None:
    process = run("from dpo_cli.smoke import *; resolve('builtin:tiny-qwen3')", DPO_CLI_CACHE=str(tmp_path))
    assert process.communicate() == ("", "")
    assert process.returncode == 0


def test_a_cached_built_in_is_found_without_heavy_imports(cache: Path) -> None:
    for builtin in BUILTINS:
        resolve(builtin)
    code = (
        "import sys; from dpo_cli.smoke import BUILTINS, resolve; [resolve(each) for each in BUILTINS];"
        "print([name for name in ('torch', 'transformers', 'trl', 'tokenizers') if name in sys.modules])"
    )
    assert run(code).communicate()[0].strip() == "[]"


def test_resolve_gives_the_same_folder_or_file_each_time_and_leaves_nothing_else(cache: Path) -> None:
    first = {builtin: resolve(builtin) for builtin in BUILTINS}
    stamps = {path: path.stat().st_mtime_ns for path in first.values()}
    assert {builtin: resolve(builtin) for builtin in BUILTINS} == first
    assert {path: path.stat().st_mtime_ns for path in first.values()} == stamps
    assert (first["builtin:tiny-qwen3"] / "config.json").is_file()
    assert all(first[f"builtin:{name}"].name.endswith(".jsonl.gz") for name in SOURCES)
    assert list(cache.iterdir()) == [first["builtin:tiny-qwen3"]]


def test_two_processes_that_build_at_once_both_succeed(tmp_path: Path) -> None:
    code = "from dpo_cli.smoke import *; print([str(resolve(each)) for each in BUILTINS])"
    pair = [run(code, DPO_CLI_CACHE=str(tmp_path)) for _ in range(2)]
    results = [process.communicate() for process in pair]
    assert results[0] == results[1] and results[0][1] == ""
    assert len(list(tmp_path.iterdir())) == 1


def test_the_cache_follows_xdg_and_then_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DPO_CLI_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert resolve(BUILTINS[0]).parent == tmp_path / "xdg" / "dpo-cli"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve(BUILTINS[0]).parent == tmp_path / "home" / ".cache" / "dpo-cli"


def test_an_unknown_id_names_the_known_ones_and_the_nearest(cache: Path) -> None:
    with pytest.raises(DpoError, match="tiny-qwen33") as caught:
        resolve("builtin:tiny-qwen33")
    hint = str(caught.value.hint)
    assert "did you mean builtin:tiny-qwen3?" in hint
    assert all(builtin in hint for builtin in BUILTINS)


def test_a_cache_that_cannot_be_written_says_how_to_move_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("DPO_CLI_CACHE", str(tmp_path / "file"))
    with pytest.raises(DpoError) as caught:
        resolve(BUILTINS[0])
    assert "DPO_CLI_CACHE" in str(caught.value.hint)
