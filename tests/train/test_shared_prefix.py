"""The shared prefix against TRL without it: loss, metrics, log-probabilities, gradients, evaluation, whole runs."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from dpo_cli.errors import DpoError
from dpo_cli.train import shared_prefix
from dpo_cli.train.prefix_check import FLOAT32_FLOOR, check
from dpo_cli.train.shared_prefix import Group, Stream, install, pair_tokens, unsupported
from tests.train.runs import trl_trainer, untimed

VOCABULARY = 300
MAX_LENGTH = 40
Rows = list[dict[str, list[int]]]


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(5, VOCABULARY) for _ in range(count)]


def ragged() -> Rows:
    """Every way in which two texts can lie beside each other, of very different lengths."""
    rng = random.Random(0)
    texts = [(9, 0, 8, 5), (1, 0, 3, 12), (4, 6, 2, 9), (12, 3, 7, 0), (5, 4, 0, 6), (6, 8, 0, 0), (20, 0, 35, 3)]
    rows = []
    for prompt, opening, chosen, rejected in texts:
        same = tokens(rng, opening)
        rows.append(
            {
                "prompt_ids": tokens(rng, prompt),
                "chosen_ids": [*same, *([3, *tokens(rng, chosen - 1)] if chosen else [])],
                "rejected_ids": [*same, *([4, *tokens(rng, rejected - 1)] if rejected else [])],
            }
        )
    return rows


def row_tokens(row: dict[str, list[int]], max_length: int = MAX_LENGTH) -> int:
    """Tokens of a pair whose common opening is computed once, each text cut off as TRL's collator does it."""
    chosen, rejected = ([*row["prompt_ids"], *row[name]][:max_length] for name in ("chosen_ids", "rejected_ids"))
    same = [one == other for one, other in zip(chosen, rejected, strict=False)]
    return len(chosen) + len(rejected) - [*same, False].index(False)


def config_of(kind: str = "Qwen3", **options: Any) -> Any:
    import transformers

    small = {
        "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20, "initializer_range": 0.15,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return getattr(transformers, f"{kind}Config")(**small | options)


def model_of(kind: str = "Qwen3", seed: int = 0, **options: Any) -> Any:
    import transformers

    torch.manual_seed(seed)
    return getattr(transformers, f"{kind}ForCausalLM")(config_of(kind, **options)).eval()


def with_lora(base: Any, seed: int = 1) -> Any:
    """A LoRA that has left its start, so that the policy is not the reference."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from dpo_cli import smoke
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(smoke.resolve("builtin:tiny-qwen3"))
    made.pad_token_id = 0
    return made


Trainers = Callable[..., Any]


class Ready:
    """Its rows are tokens already."""

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset


@pytest.fixture
def trainer(tmp_path: Path, tokenizer: Any) -> Trainers:
    """`trainer(model, loss_type=…)`: TRL's, over rows that are tokens already."""
    chosen: dict[str, Any] = {
        "max_length": MAX_LENGTH, "gradient_checkpointing": False, "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3, "max_steps": 3, "learning_rate": 1e-3,
    }  # fmt: skip

    def go(model: Any, evaluation: Rows | None = None, **options: Any) -> Any:
        made = trl_trainer(
            tmp_path / "trl", model, tokenizer, ragged(), Ready, evaluation=evaluation, **chosen | options
        )
        made.model.delete_adapter("ref")  # a copy of the policy as it is: the reference would be the policy
        return made

    return go


@dataclass
class Step:
    """What one training step gives."""

    loss: float
    metrics: dict[str, float]
    gradients: dict[str, Any]


def step(made: Any) -> Step:
    """A forward and backward of TRL's on one batch; checkpointing as `train()` switches it on."""
    if made.args.gradient_checkpointing:
        made.model.gradient_checkpointing_enable(made.args.gradient_checkpointing_kwargs)
    made.model.train()
    made.model.zero_grad()
    made._metrics["train"].clear()
    loss = made.compute_loss(made.model, made.data_collator(ragged()))
    loss.backward()
    metrics = {name: values[-1] for name, values in made._metrics["train"].items()}
    gradients = {name: one.grad.clone() for name, one in made.model.named_parameters() if one.grad is not None}
    return Step(loss.item(), metrics, gradients)


def log_probs(made: Any, rows: Rows) -> Any:
    """[2B, L - 1] with 0 outside of the completions."""
    batch = made.data_collator(rows)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return made.model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs


def relative_error(ours: dict[str, Any], stock: dict[str, Any]) -> float:
    """|| ours - stock || / || stock || over all parameters."""
    assert ours.keys() == stock.keys() and stock
    squares = sum(float((ours[name] - stock[name]).double().pow(2).sum()) for name in stock)
    return float((squares / sum(float(one.double().pow(2).sum()) for one in stock.values())) ** 0.5)


def assert_same(ours: Step, stock: Step) -> None:
    assert ours.loss == pytest.approx(stock.loss, abs=1e-5)
    assert ours.metrics == pytest.approx(stock.metrics, rel=1e-5, abs=1e-5)
    assert relative_error(ours.gradients, stock.gradients) < 1e-5


def rejected_sees_chosen(real: Callable[..., Stream | None]) -> Callable[..., Stream | None]:
    """What is wrong where a mask is lost: the rejected rest attends to all that stands before it in the row."""

    def lay_out(*batch: Any) -> Stream | None:
        made = real(*batch)
        assert made is not None
        made.groups[:] = [Group(start, ends[0], ends) for start, _, ends in made.groups]
        return made

    return lay_out


# ------------------------------------------------------------------------------------------------------- same numbers

LOSSES: list[dict[str, Any]] = [
    {"loss_type": ["sigmoid"]},
    {"loss_type": ["sigmoid_norm"]},
    {"loss_type": ["ipo"]},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    {"loss_type": ["robust"], "label_smoothing": 0.1},
    {"loss_type": ["apo_zero"]},
    {"loss_type": ["aot"]},
    {"loss_type": ["exo_pair"], "label_smoothing": 0.1},
    {"loss_type": ["hinge"]},
    {"loss_type": ["nca_pair"]},
    {"loss_type": ["bco_pair"]},
    {"loss_type": ["sigmoid"], "ld_alpha": 0.5},
    {"loss_type": ["sigmoid"], "use_weighting": True},
    {"loss_type": ["sigmoid"], "f_divergence_type": "js_divergence"},
    {"loss_type": ["sigmoid"], "f_divergence_type": "alpha_divergence"},
]
CHECKPOINTING: list[dict[str, Any]] = [
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": mode}} for mode in (False, True)
]


ORDINARY = (["sigmoid"], ["aot"], ["sigmoid", "sft"])


@pytest.mark.parametrize(
    "options",
    [pytest.param(one, marks=pytest.mark.slow if one["loss_type"] not in ORDINARY else []) for one in LOSSES],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_loss_metrics_and_gradients_are_trls(trainer: Trainers, options: dict[str, Any]) -> None:
    stock = with_lora(model_of())
    model = copy.deepcopy(stock)
    shared = install(model)
    assert_same(step(trainer(model, **options)), step(trainer(stock, **options)))
    assert shared.padded_tokens > 1.5 * shared.stream_tokens > 0


@pytest.mark.parametrize("options", CHECKPOINTING, ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("kind", ["Qwen3", pytest.param("Llama", marks=pytest.mark.slow)])
def test_with_checkpointing_too(trainer: Trainers, options: dict[str, Any], kind: str) -> None:
    stock = with_lora(model_of(kind))
    model = copy.deepcopy(stock)
    shared = install(model)
    assert_same(step(trainer(model, **options)), step(trainer(stock)))
    assert shared.stream_tokens == 2 * sum(row_tokens(row) for row in ragged())  # reference and policy


def test_in_4_bit_too(trainer: Trainers, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model_of(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path / "model")
    nf4: Any = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    options: Any = {"quantization_config": nf4, "dtype": torch.float32}
    stock, model = (with_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)) for _ in range(2))
    shared = install(model)
    steps = []
    for one in (model, stock):
        made = trainer(one)
        one.float()  # TRL makes a 4-bit model's LoRA bfloat16, which is too coarse to compare
        steps.append(step(made))
    assert_same(*steps)
    assert shared.stream_tokens > 0


def strangers() -> Rows:
    rng = random.Random(3)
    return [
        {"prompt_ids": [], "chosen_ids": tokens(rng, first), "rejected_ids": tokens(rng, second)}
        for first, second in ((3, 9), (14, 1), (1, 6))
    ]


@pytest.mark.parametrize("rows", [ragged(), strangers()], ids=["pairs", "nothing in common"])
def test_log_probabilities_are_the_same_token_by_token(trainer: Trainers, rows: Rows) -> None:
    made = trainer(with_lora(model_of()))
    stock = log_probs(made, rows)
    shared = install(made.model)
    assert float((log_probs(made, rows) - stock).abs().max()) < 1e-5 * float(stock.abs().max())
    collated = made.data_collator(rows)
    counts = pair_tokens(collated["input_ids"], collated["attention_mask"]).tolist()
    assert counts == [row_tokens(row) for row in rows]
    assert (shared.padded_tokens, shared.stream_tokens) == (collated["input_ids"].numel(), sum(counts))


def test_a_run_with_evaluation_is_trls_run(trainer: Trainers) -> None:
    stock = with_lora(model_of())
    model = copy.deepcopy(stock)
    shared = install(model)
    runs = []
    for one in (model, stock):
        torch.manual_seed(3)
        made = trainer(one, evaluation=ragged()[:5], eval_strategy="steps", eval_steps=2)
        made.train()
        made.evaluate()
        runs.append(
            (
                untimed(made.state.log_history),
                {name: one.detach() for name, one in made.model.named_parameters() if one.requires_grad},
            )
        )
    (ours, after), (theirs, expected) = runs
    assert len(ours) == len(theirs) and any("eval_loss" in row for row in theirs)
    for row, wanted in zip(ours, theirs, strict=True):
        assert row == pytest.approx(wanted, rel=1e-5, abs=1e-4 if "grad_norm" in wanted else 1e-5)
    assert relative_error(after, expected) < 1e-4
    assert shared.stream_tokens > 0


def test_a_models_own_scale_and_dropout_of_attention_are_kept() -> None:
    stock = model_of(attention_dropout=0.5)
    for layer in stock.model.layers:
        layer.self_attn.scaling *= 3  # as families have it whose scale is not that of the head's width
    model, real = copy.deepcopy(stock), batch()["attention_mask"].bool()
    shared = install(model)
    with torch.no_grad():
        assert torch.allclose(model(**batch()).logits[real], stock(**batch()).logits[real], atol=1e-4)
        assert shared.stream_tokens > 0
        model.train()
        one, other = (model(**batch()).logits[real] for _ in range(2))
    assert not torch.allclose(one, other, atol=1e-3)


# ----------------------------------------------------------------------------------------------------------- untouched


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_is_untouched(use_cache: bool) -> None:
    stock = with_lora(model_of())
    model = copy.deepcopy(stock)
    shared = install(model)
    prompts = torch.tensor([[0, 0, 7, 8, 9], [11, 12, 13, 14, 15]])  # left-padded, as generation wants it
    options: Any = {"attention_mask": (prompts != 0).long(), "max_new_tokens": 8, "use_cache": use_cache}
    assert model.generate(prompts, **options).tolist() == stock.generate(prompts, **options).tolist()
    options |= {"do_sample": True, "top_k": 0}
    drawn = []
    for one in (model, stock):
        torch.manual_seed(4)
        drawn.append(one.generate(prompts, **options).tolist())
    assert drawn[0] == drawn[1]
    assert shared.stream_tokens == 0


def batch(**changes: Any) -> dict[str, Any]:
    """Two pairs, right-padded; `changes` are put in, None takes out."""
    ids = torch.tensor([[7, 8, 9, 10, 11], [7, 8, 9, 0, 0], [7, 8, 12, 13, 0], [7, 8, 9, 14, 15]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "use_cache": False} | changes
    return {name: value for name, value in inputs.items() if value is not None}


def not_shared() -> dict[str, Callable[[Any], dict[str, Any]]]:
    def embedded(model: Any) -> dict[str, Any]:
        return batch(input_ids=None, inputs_embeds=model.get_input_embeddings()(batch()["input_ids"]))

    def first(rows: int, columns: int) -> dict[str, Any]:
        return batch(**{name: batch()[name][:rows, :columns] for name in ("input_ids", "attention_mask")})

    return {
        "left padding": lambda model: batch(
            input_ids=batch()["input_ids"].flip(1), attention_mask=batch()["attention_mask"].flip(1)
        ),
        "a hole": lambda model: batch(attention_mask=torch.tensor([[1, 0, 1, 1, 1]] * 4)),
        "an empty row": lambda model: batch(attention_mask=torch.tensor([[1] * 5] * 3 + [[0] * 5])),
        "an odd batch": lambda model: first(3, 5),
        "one token": lambda model: first(4, 1),
        "no mask": lambda model: batch(attention_mask=None),
        "positions": lambda model: batch(position_ids=torch.arange(5)[None].expand(4, -1)),
        "embeddings": embedded,
        "a cache": lambda model: batch(use_cache=True),
        "a cache by default": lambda model: batch(use_cache=None),
        "all states": lambda model: batch(output_hidden_states=True),
        "a tuple": lambda model: batch(return_dict=False),
    }


@pytest.mark.parametrize("case", not_shared())
def test_what_cannot_be_shared_takes_the_untouched_path(case: str) -> None:
    stock = model_of()
    model = copy.deepcopy(stock)
    shared = install(model)
    with torch.no_grad():
        inputs = not_shared()[case](stock)
        ours, theirs = model.model(**inputs), stock.model(**inputs)
        assert type(ours) is type(theirs) and torch.equal(ours[0], theirs[0])
        if case != "a tuple":
            assert ours.keys() == theirs.keys()
        assert shared.stream_tokens == shared.padded_tokens == 0
        model(**batch())
    assert (shared.padded_tokens, shared.stream_tokens) == (20, 7 + 5)


def test_noise_on_the_embeddings_takes_the_untouched_path() -> None:
    from transformers.integrations.neftune import activate_neftune, deactivate_neftune

    model = model_of()
    shared = install(model)
    hook: Any = activate_neftune(model, 5.0)  # what `train()` does with neftune_noise_alpha
    model(**batch())
    assert shared.stream_tokens == 0
    deactivate_neftune(model, hook)
    model(**batch())
    assert shared.stream_tokens > 0


def test_it_can_be_switched_off() -> None:
    stock = model_of()
    model = copy.deepcopy(stock)
    shared = install(model)
    assert install(model) is shared
    shared.enabled = False
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, stock(**batch()).logits)
    assert shared.stream_tokens == 0


def test_nothing_of_it_is_saved(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = with_lora(model_of())
    install(model)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.save(merged.state_dict(), tmp_path / "merged" / "state.bin")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        assert b"shared_prefix" not in path.read_bytes(), path
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.allclose(again(**batch()).logits[0], merged(**batch()).logits[0], atol=1e-4)


# -------------------------------------------------------------------------------------------------------- unsupported


def unable() -> dict[str, tuple[Callable[[], Any], str]]:
    window: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return {
        "window": (lambda: model_of(**window, max_window_layers=1), "sliding window"),
        "window of all layers": (lambda: model_of("Mistral", sliding_window=8), "sliding window"),
        "experts": (lambda: model_of("Qwen3Moe", **experts), "mixture of experts"),
        "eager": (lambda: model_of(attn_implementation="eager"), "its attention is eager"),
        "flex": (lambda: model_of(attn_implementation="flex_attention"), "its attention is flex_attention"),
        "linear": (lambda: model_of(layer_types=["full_attention", "linear_attention", "full_attention"]), "linear"),
        "caps": (lambda: model_of("Gemma2", layer_types=["full_attention"] * 3), "caps its attention scores"),
        "other layers": (gpt2, "decoder layers of GPT2LMHeadModel"),
    }


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=VOCABULARY))


@pytest.mark.parametrize("case", unable())
def test_a_model_that_cannot_share_is_named_and_refused(case: str) -> None:
    make, words = unable()[case]
    model = make()
    assert words in (unsupported(model) or "")
    with pytest.raises(DpoError, match=words):
        install(model)


def test_plain_decoders_can_share_but_for_an_unsloth_without_its_hook() -> None:
    for kind in ("Qwen3", "Qwen2", "Llama"):
        assert unsupported(model_of(kind)) is None
        assert unsupported(with_lora(model_of(kind))) is None
    assert unsupported(model_of("Mistral", sliding_window=None)) is None
    assert "no hook" in (unsupported(model_of(), unsloth=True) or "")


# -------------------------------------------------------------------------------------------------------------- check


@pytest.mark.parametrize(("autocast", "training"), [(False, True), (True, False)], ids=["float32", "bfloat16"])
def test_the_check_passes_and_leaves_nothing_behind(trainer: Trainers, autocast: bool, training: bool) -> None:
    import numpy

    model = with_lora(model_of(attention_dropout=0.3))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    shared = install(model)
    made = trainer(model, bf16=autocast, disable_dropout=False)
    made.model.train(training)
    torch.manual_seed(7)
    before = torch.get_rng_state(), random.getstate(), pickle.dumps(numpy.random.get_state())
    modes = [module.training for module in made.model.modules()]
    found = check(made, shared, made.data_collator(ragged()))
    assert found.ok and not found.error
    assert 0 < found.difference <= found.limit and found.noise > 0
    assert found.limit > FLOAT32_FLOOR, "what another order of the sums comes to over many layers"
    assert found.limit < (0.5 if autocast else 1e-3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), pickle.dumps(numpy.random.get_state()))
    assert modes == [module.training for module in made.model.modules()]
    assert all(parameter.grad is None for parameter in made.model.parameters())
    assert shared.enabled and (shared.padded_tokens, shared.stream_tokens) == (0, 0)
    assert not made._metrics["train"]


class ForwardOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Any) -> Any:
        return states.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        raise RuntimeError("CUDA out of memory")


def saboteur(change: Callable[..., Any]) -> Callable[..., Any]:
    """Our attention with a fault in it; the stock path's stays."""
    attend = shared_prefix._attention

    def attention(module: Any, query: Any, key: Any, value: Any, *inputs: Any, **options: Any) -> Any:
        if options.get("shared_groups") is None:
            return attend(module, query, key, value, *inputs, **options)
        return change(attend, module, query, key, value, *inputs, **options)

    return attention


def no_kernel(*inputs: Any, **options: Any) -> None:
    raise ValueError("no such kernel")


FAULTS: dict[str, tuple[str, Callable[..., Any], str]] = {
    "wrong attention": ("_lay_out", rejected_sees_chosen(shared_prefix._lay_out), "log-probabilities differ"),
    "no kernel": ("_attention", saboteur(no_kernel), "ValueError: no such kernel"),
    "forward only": ("_attention", saboteur(lambda attend, *args, **options: (
        ForwardOnly.apply(attend(*args, **options)[0]), None)), "CUDA out of memory"),
    "wrong gradient": ("_attention", saboteur(lambda attend, module, query, key, value, *args, **options: attend(
        module, query, key, value.detach(), *args, **options)), "gradients differ"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "autocast"), [*((fault, False) for fault in FAULTS), ("wrong attention", True), ("wrong gradient", True)]
)
def test_the_check_finds_what_is_wrong_and_leaves_no_gradient(
    trainer: Trainers, monkeypatch: pytest.MonkeyPatch, autocast: bool, fault: str
) -> None:
    """An error costs sharing, not the run."""
    made = trainer(with_lora(model_of()), bf16=autocast)
    name, broken, why_not = FAULTS[fault]
    monkeypatch.setattr(shared_prefix, name, broken)
    shared = install(made.model)
    found = check(made, shared, made.data_collator(ragged()))
    assert not found.ok and why_not in found.why_not()
    assert fault != "wrong attention" or found.difference > 3 * found.limit
    assert all(parameter.grad is None for parameter in made.model.parameters())


def test_the_check_allows_what_batches_of_the_stock_path_differ_by(trainer: Trainers) -> None:
    """As kernels do that are chosen by the size of a batch."""
    made = trainer(with_lora(model_of()))
    shared = install(made.model)
    norm = made.model.get_base_model().model.norm
    norm.register_forward_hook(lambda module, args, states: states * (1 + 1e-3 * (len(states) - 1)))
    found = check(made, shared, made.data_collator(ragged()))
    assert found.ok and found.limit == 2 * found.noise > 1e-3


def test_the_check_says_why_it_proves_nothing(trainer: Trainers) -> None:
    from transformers.integrations.neftune import activate_neftune, deactivate_neftune

    made = trainer(with_lora(model_of()))
    shared = install(made.model)
    hook: Any = activate_neftune(made.model, 5.0)
    before = torch.get_rng_state()
    assert "untouched path" in check(made, shared, made.data_collator(ragged())).error
    assert torch.equal(before, torch.get_rng_state()), "its noise of the check is not the training's"
    deactivate_neftune(made.model, hook)
    left = {name: value.flip(1) for name, value in made.data_collator(ragged()).items()}
    found = check(made, shared, left)
    assert not found.ok and "untouched path" in found.error
    made.model.get_base_model().model.norm.weight.data.fill_(float("nan"))
    found = check(made, shared, made.data_collator(ragged()))
    assert not found.ok and "differ from the stock path's by nan" in found.why_not()


def test_zeros_that_ask_for_nothing_do_not_keep_a_batch_from_sharing() -> None:
    """As Unsloth's forward of a PEFT model hands them down to the backbone; any other value does ask for something."""
    model = with_lora(model_of())
    shared = install(model)
    texts = {"input_ids": torch.tensor([[1, 2, 3], [1, 2, 4]]), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    for name in ("logits_to_keep", "num_logits_to_keep"):
        assert shared._stream((), {**texts, "use_cache": False, name: 0})
        assert shared._stream((), {**texts, "use_cache": False, name: 2}) is None
    assert shared._stream((), {**texts, "use_cache": False, "position_ids": torch.zeros(1, dtype=torch.long)}) is None
