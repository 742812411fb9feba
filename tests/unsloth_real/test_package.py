"""What dpo-cli and its stand-in take Unsloth for, compared with the package; more of it in `test_training.py`."""

from __future__ import annotations

import ast
import importlib
import inspect
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
MODELS = ast.parse((REPOSITORY / "dpo_cli" / "models.py").read_text(encoding="utf-8"))
DOUBLE = ast.parse((REPOSITORY / "tests" / "train" / "unsloth_double" / "unsloth.py").read_text(encoding="utf-8"))

METHODS = ["from_pretrained", "get_peft_model"]
# Not in the signature: Unsloth takes these out of **kwargs, where a misspelt one would pass unseen.
OUT_OF_KWARGS = {"local_files_only"}
# A list in the package, None in the stand-in; dpo-cli always passes its own.
OTHER_DEFAULTS = {"target_modules"}


def passed(method: str) -> set[str]:
    """The keywords of dpo-cli's own call of a method of FastLanguageModel, from its source."""
    calls = [
        node
        for node in ast.walk(MODELS)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"FastLanguageModel.{method}"
    ]
    assert len(calls) == 1
    names = [keyword.arg for keyword in calls[0].keywords]
    assert None not in names, "no **options: what is passed has to stand there"
    return {str(name) for name in names}


def doubled(method: str) -> dict[str, tuple[Any, Any]]:
    """The parameters of the stand-in: name -> (kind, default), in their order, without importing it."""
    [function] = [node for node in ast.walk(DOUBLE) if isinstance(node, ast.FunctionDef) and node.name == method]
    arguments = function.args
    assert not arguments.posonlyargs and not arguments.kwonlyargs and not arguments.vararg and arguments.kwarg
    without: list[Any] = [inspect.Parameter.empty] * (len(arguments.args) - len(arguments.defaults))
    defaults = without + [ast.literal_eval(default) for default in arguments.defaults]
    named = zip(arguments.args, defaults, strict=True)
    return {argument.arg: (inspect.Parameter.POSITIONAL_OR_KEYWORD, default) for argument, default in named}


@pytest.mark.parametrize("method", METHODS)
def test_unsloth_knows_every_keyword_that_dpo_cli_passes(unsloth: Any, method: str) -> None:
    function = getattr(unsloth.FastLanguageModel, method)
    named = set(inspect.signature(function).parameters)
    assert passed(method) - named <= OUT_OF_KWARGS


def test_unsloth_reads_what_goes_through_its_kwargs(unsloth: Any) -> None:
    source = inspect.getsource(inspect.unwrap(unsloth.FastLanguageModel.from_pretrained))
    for name in OUT_OF_KWARGS:
        assert f'kwargs.get("{name}"' in source


@pytest.mark.parametrize("method", METHODS)
def test_the_stand_in_has_the_packages_parameters(unsloth: Any, method: str) -> None:
    """It may leave some out, but has no other name, kind, order or default; and it names what dpo-cli passes."""
    real = inspect.signature(getattr(unsloth.FastLanguageModel, method)).parameters
    double = doubled(method)
    assert [name for name in real if name in double] == sorted(double, key=list(real).index)
    kept = {name: (real[name].kind, real[name].default) for name in double if name not in OTHER_DEFAULTS}
    assert {name: double[name] for name in kept} == kept
    assert passed(method) - set(double) <= OUT_OF_KWARGS
    assert any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in real.values())


def value_in_double(name: str) -> Any:
    [value] = [
        node.value for node in DOUBLE.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    ]
    return ast.literal_eval(value)


def test_the_stand_in_is_of_this_version(unsloth: Any) -> None:
    pinned = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]["unsloth"]
    assert unsloth.__version__ == value_in_double("__version__")
    assert f"unsloth=={unsloth.__version__}" in pinned


def test_a_peft_model_hands_down_what_was_not_asked_for(unsloth: Any) -> None:
    """As in the stand-in: zeros, which ask for no logits in particular."""
    from unsloth.models.llama import PeftModel_fast_forward

    class Base:
        model = None

        def __call__(self, **options: Any) -> dict[str, Any]:
            return options

    given = PeftModel_fast_forward(SimpleNamespace(base_model=Base()), input_ids="some")
    assert given["input_ids"] == "some"
    assert (given["num_logits_to_keep"], given["logits_to_keep"]) == (0, 0)


def test_its_warning_of_a_run_before_training_is_filtered(unsloth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The preflight is such a run."""
    from dpo_cli.environment import prepare_environment
    from unsloth.models._utils import _unsloth_reset_stray_compile_cache as reset

    def probed() -> Any:
        model: Any = torch.nn.Linear(1, 1)
        model._unsloth_pretrain_marker = {"seen": True}
        return SimpleNamespace(model=model)

    monkeypatch.setenv("UNSLOTH_COMPILE_DISABLE", "0")
    with pytest.warns(UserWarning, match="manual forward/backward"):
        reset(probed())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepare_environment("train")
        reset(probed())
    assert not caught


def test_unsloth_swaps_a_name_as_the_stand_in_does(unsloth: Any) -> None:
    """It is why dpo-cli asks for exact names."""
    from unsloth.models.loader_utils import get_model_name

    for name, other in value_in_double("SWAPPED").items():
        assert get_model_name(name, load_in_4bit=True) == other


def test_unsloth_replaces_trls_classes(unsloth: Any) -> None:
    from dpo_cli.train.methods import METHODS as TRAINERS

    for method in TRAINERS.values():
        assert method.classes()[1].__name__ == f"Unsloth{method.trainer}"


def test_unsloths_config_has_the_habits_of_the_stand_in(unsloth: Any, tmp_path: Path, capsys: Any) -> None:
    """Other defaults, so dpo-cli passes every argument; and a strange one is dropped, so it checks names itself."""
    changed = value_in_double("CHANGED_DEFAULTS")
    trl: Any = importlib.import_module("trl")
    config = trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, nonsense=3)
    assert {name: getattr(config, name) for name in changed} == changed
    assert "nonsense" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_one_row_of_tokens_keeps_prompt_chosen_and_rejected_apart(unsloth: Any) -> None:
    """`prefix_seg_info`, which Unsloth's Qwen3 takes: both answers see their prompt, and never each other."""
    import unsloth.models.qwen3 as qwen3
    from torch.nn.functional import scaled_dot_product_attention as attend
    from unsloth.utils import prefix_grouper_kernel as kernel

    assert "prefix_seg_info" in inspect.getsource(qwen3.Qwen3Attention_fast_forward)
    pairs = [(5, [3, 4]), (2, [2, 6])]  # prompt, [chosen, rejected], in tokens
    made = kernel.build_seg_info_multigroup(pairs, torch.device("cpu"))
    assert isinstance(made, tuple) and isinstance(made[0], kernel.PrefixSegInfo)
    tokens = sum(prompt + sum(answers) for prompt, answers in pairs)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, tokens, heads, 16) for heads in (4, 2, 2))
    out = kernel.flex_shared_prefix_attention(q, k, v, made[0], compiled=False)

    start = 0
    for prompt, answers in pairs:
        answer = start + prompt
        for length in answers:
            rows = [*range(start, start + prompt), *range(answer, answer + length)]
            query, key, value = (tensor[:, rows].transpose(1, 2) for tensor in (q, k, v))
            expected = attend(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
            torch.testing.assert_close(out[:, rows], expected, atol=1e-5, rtol=1e-5)
            answer += length
        start = answer
