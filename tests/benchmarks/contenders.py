"""The contenders of `bench_train.py`: who trains on the same pairs, from the same weights, in the same order.

Each is built, measured for some steps, and thrown away, so that every measurement starts from the same adapter. Its
B is random, not zero: a policy equal to its reference would hide half of all mistakes.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from lengths import Lengths, Tokens, tokens

sys.path.insert(0, str(Path(__file__).parents[1] / "reference"))

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FIRST_TOKEN = 8  # ids below are the tokenizer's own


@dataclass(frozen=True)
class Shape:
    """Of a Qwen3; the real ones as their `config.json` has them."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 16, 128, 512),
    "small": Shape(256, 4, 4, 2, 64, 768, 2000),
    "layer": Shape(512, 1, 8, 4, 64, 1536, 2000),
    "bench": Shape(512, 6, 8, 4, 64, 1536, 8000),
    "0.6B": Shape(1024, 28, 16, 8, 128, 3072, 151936),
    "1.7B": Shape(2048, 28, 16, 8, 128, 6144, 151936),
    "4B": Shape(2560, 36, 32, 8, 128, 9728, 151936),
}


@dataclass(frozen=True)
class Work:
    """What all contenders of a table are given."""

    rows: Sequence[Lengths]  # lengths of the pairs, `step_pairs` for each step, in the order in which they are used
    step_pairs: int
    model: Path  # folder of the base model and its tokenizer
    folder: Path  # a run's folder, with `data/train.jsonl`
    max_length: int = 1024
    device: str = "cpu"  # (float32) or cuda (NF4, bfloat16)
    backend: str = "hf"  # or unsloth, for TRL's script and dpo-cli alike
    warm_up: int = 0  # steps before the clock starts, on the pairs of the first steps; only a GPU needs them
    token_budget: int | str = "auto"  # of dpo-cli
    learning_rate: float = 1e-4
    seed: int = 0
    rank: int = 16
    beta: float = 0.1

    @property
    def steps(self) -> int:
        return len(self.rows) // self.step_pairs

    @property
    def pairs(self) -> list[Tokens]:
        return tokens(self.rows, json.loads((self.model / "config.json").read_text())["vocab_size"], FIRST_TOKEN)


@dataclass
class Measured:
    """Some steps of a contender."""

    wall: float = 0.0  # seconds of the steps, without warm-up, loading and what the reference cost before them
    cpu: float = 0.0
    losses: list[float] = field(default_factory=list)  # of each step
    gradient: Any = None  # of all adapter weights at the first step, flat
    reference_cpu: float = 0.0  # CPU seconds of reference passes before the first step
    peak: int = 0  # bytes on the GPU; 0 on a CPU
    seen: tuple[int, int] = (0, 0)  # tokens of the forwards that shared a prefix: padded, and as computed
    token_budget: int | None = None  # that dpo-cli took


@dataclass
class Built:
    """A contender that is ready to train: `go(begin, end)` calls the two around its measured steps."""

    go: Callable[[Callable[[], None], Callable[[], None]], list[float]]
    shared: Any = None
    token_budget: int | None = None


@dataclass(frozen=True)
class Contender:
    """`micro_batch` pairs at once, where no token budget says otherwise."""

    key: str
    label: str
    build: Callable[[Work], Built]
    micro_batch: int = 1
    checkpointing: bool = False


# ------------------------------------------------------------------------------------------------------- who takes part


def by_hand(micro_batch: int = 1) -> Contender:
    return Contender(f"by_hand_{micro_batch}", f"plain torch, by hand, batch {micro_batch}", _ByHand(micro_batch))


def trl_defaults() -> Contender:
    build = _Trl(1, checkpointing=True)
    return Contender("trl_defaults", "TRL script, defaults (checkpointing on)", build, checkpointing=True)


def stock(micro_batch: int) -> Contender:
    """TRL with dpo-cli's settings: no checkpointing, the reference computed in each step."""
    label = f"TRL, no checkpointing, batch {micro_batch}"
    return Contender(f"stock_{micro_batch}", label, _Trl(micro_batch), micro_batch)


def tuned(micro_batch: int) -> Contender:
    label = f"TRL by hand: no checkpointing, ref. precomputed, batch {micro_batch}"
    return Contender(f"tuned_{micro_batch}", label, _Trl(micro_batch, precompute=True), micro_batch)


def dpo_cli(label: str = "", micro_batch: int = 1, **engine: str) -> Contender:
    """dpo-cli with the parts of `engine` set: shared_prefix, token_budget, reference_cache; all on but for those."""
    parts = {"shared_prefix": "on", "token_budget": "auto", "reference_cache": "on"} | engine
    off = [name for name, value in parts.items() if value == "off"]
    key = "dpo_cli_" + ("without_" + "_and_".join(off) if off else "warm") + f"_{micro_batch}" * (micro_batch > 1)
    label = label or ("dpo-cli, all on, reference cache warm" if not off else f"dpo-cli, off: {', '.join(off)}")
    return Contender(key, label, _DpoCli(micro_batch, parts), micro_batch)


NOTHING = {"shared_prefix": "off", "token_budget": "off", "reference_cache": "off"}


# ----------------------------------------------------------------------------------------------------------- measuring


def measure(contender: Contender, work: Work) -> Measured:
    """Build a contender, let it do the work's steps, and forget it."""
    import torch

    made = Measured()
    on_gpu = work.device == "cuda"
    clock = [0.0, 0.0]

    def begin() -> None:
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        clock[:] = time.perf_counter(), time.process_time()

    def end() -> None:
        if on_gpu:
            torch.cuda.synchronize()
            made.peak = torch.cuda.max_memory_allocated()
        made.wall, made.cpu = time.perf_counter() - clock[0], time.process_time() - clock[1]

    with reference_passes() as passes:
        built = contender.build(work)
    shared = built.shared
    before = (shared.padded_tokens, shared.stream_tokens) if shared else (0, 0)
    made.token_budget = built.token_budget
    made.reference_cpu = passes.cpu
    with first_gradient() as gradient:
        made.losses = built.go(begin, end)
    made.gradient = gradient[0]
    if shared:
        made.seen = shared.padded_tokens - before[0], shared.stream_tokens - before[1]
    del built, shared
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return made


def reference_pairs(contender: Contender, work: Work) -> int:
    """Pairs whose reference a contender computes before its first step; no step is taken."""
    with reference_passes() as passes:
        contender.build(work)
    return passes.pairs


@dataclass
class Passes:
    pairs: int = 0
    cpu: float = 0.0


@contextmanager
def reference_passes() -> Iterator[Passes]:
    """Counts what TRL's function for the reference computes within it, whoever calls it."""
    trl: Any = import_module("trl")
    counted = Passes()
    original = trl.DPOTrainer.compute_ref_log_probs

    def counting(self: Any, model: Any, inputs: Any) -> Any:
        before = time.process_time()
        result = original(self, model, inputs)
        counted.pairs += len(inputs["input_ids"]) // 2
        counted.cpu += time.process_time() - before
        return result

    trl.DPOTrainer.compute_ref_log_probs = counting
    try:
        yield counted
    finally:
        trl.DPOTrainer.compute_ref_log_probs = original


@contextmanager
def first_gradient() -> Iterator[list[Any]]:
    """[0] is what the first optimizer step within it saw, flat, on the CPU, whoever's optimizer it is."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    found: list[Any] = []

    def hook(optimizer: Any, *_: Any) -> None:
        if not found:
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            found.append(torch.cat([weight.grad.detach().float().cpu().flatten() for weight in weights]))

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


@dataclass
class Kept:
    now: int = 0
    peak: int = 0


@contextmanager
def kept_for_backward() -> Iterator[Kept]:
    """Bytes that autograd holds for the backward within it: each storage once, no weights."""
    import torch
    from torch.autograd.graph import saved_tensors_hooks

    kept, users = Kept(), dict[int, int]()

    class Held:
        def __init__(self, tensor: Any) -> None:
            self.tensor = tensor
            storage = tensor.untyped_storage()
            self.at, self.size = storage.data_ptr(), storage.nbytes()
            users[self.at] = users.get(self.at, 0) + 1
            if users[self.at] == 1:
                kept.now += self.size
                kept.peak = max(kept.peak, kept.now)

        def __del__(self) -> None:
            users[self.at] -= 1
            if not users[self.at]:
                kept.now -= self.size

    weights: set[int] = set()

    def pack(tensor: Any) -> Any:
        base = tensor if tensor._base is None else tensor._base
        if isinstance(base, torch.nn.Parameter) or tensor.untyped_storage().data_ptr() in weights:
            weights.add(tensor.untyped_storage().data_ptr())
            return tensor
        return Held(tensor)

    with saved_tensors_hooks(pack, lambda held: held.tensor if isinstance(held, Held) else held):
        yield kept


def script_steps(work: Work) -> list[float]:
    """CPU seconds of each step of a bare TRL script, from one optimizer step to the next; the first two left out."""
    built = _Trl(1)(work)
    with _step_times() as times:
        built.go(lambda: None, lambda: None)
    return _between(times)


def command_steps(work: Work) -> list[float]:
    """The same of `dpo-cli train`, whole, with every part of `engine` off."""
    from dpo_cli.run import Run
    from dpo_cli.train.trainer import train

    with _step_times() as times:
        train(recipe_of(work, 1, NOTHING, gradient_checkpointing=False), Run(work.folder), fresh=True, quiet=True)
    return _between(times)


@contextmanager
def _step_times() -> Iterator[list[float]]:
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    times: list[float] = []
    handle = register_optimizer_step_pre_hook(lambda *_: times.append(time.process_time()))
    try:
        yield times
    finally:
        handle.remove()


def _between(times: Sequence[float]) -> list[float]:
    return [late - early for early, late in pairwise(times)][2:]


def _marks(begin: Callable[[], None], end: Callable[[], None], warm_up: int) -> Any:
    from transformers import TrainerCallback

    class Marks(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            if not warm_up:
                begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == warm_up:
                begin()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            end()

    return Marks()


# ------------------------------------------------------------------------------------------------------------ builders


@dataclass(frozen=True)
class _ByHand:
    """`tests/reference/mini_dpo.py`: two models, padded rows, logits for every position."""

    micro_batch: int

    def __call__(self, work: Work) -> Built:
        import mini_dpo
        import torch
        from peft import LoraConfig, get_peft_model

        policy = get_peft_model(_base(work), LoraConfig(**_lora(work.rank)))
        if work.device == "cuda":  # as TRL does where the base is quantised
            for weight in policy.parameters():
                weight.data = weight.data.bfloat16() if weight.requires_grad else weight.data
        _start(policy)
        reference = _base(work)
        for module in policy.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        pairs = [mini_dpo.Pair(*pair) for pair in work.pairs]
        settings = mini_dpo.Settings(
            beta=work.beta,
            learning_rate=work.learning_rate,
            micro_batch=self.micro_batch,
            accumulation=work.step_pairs // self.micro_batch,
            max_grad_norm=0.0,
            max_length=work.max_length,
        )

        def go(begin: Callable[[], None], end: Callable[[], None]) -> list[float]:
            losses = []
            autocast = torch.autocast("cuda", torch.bfloat16) if work.device == "cuda" else nullcontext()
            with autocast:
                if not work.warm_up:
                    begin()
                for loss in mini_dpo.train(policy, reference, pairs, work.warm_up + work.steps, settings):
                    losses.append(loss)
                    if len(losses) == work.warm_up:
                        begin()
                end()
            return losses

        return Built(go)


@dataclass(frozen=True)
class _Trl:
    """A script as TRL's documentation writes it."""

    micro_batch: int
    checkpointing: bool = False
    precompute: bool = False

    def __call__(self, work: Work) -> Built:
        from datasets import load_dataset
        from peft import LoraConfig

        trl: Any = import_module("trl")  # after Unsloth, which patches it
        on_gpu = work.device == "cuda"
        args = trl.DPOConfig(
            output_dir=str(work.folder / "stock"),
            per_device_train_batch_size=self.micro_batch,
            gradient_accumulation_steps=work.step_pairs // self.micro_batch,
            gradient_checkpointing=self.checkpointing,
            precompute_ref_log_probs=self.precompute,
            max_length=work.max_length,
            max_steps=work.warm_up + work.steps,
            learning_rate=work.learning_rate,
            beta=work.beta,
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            seed=work.seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not on_gpu,
            bf16=on_gpu,
            dataloader_pin_memory=on_gpu,
        )
        pairs = load_dataset("json", data_files=str(work.folder / "data" / "train.jsonl"), split="train")
        if work.backend == "unsloth":
            model, tokenizer, peft = *_unsloth(work, self.checkpointing), None
        else:
            model, tokenizer, peft = _base(work), _tokenizer(work), LoraConfig(**_lora(work.rank))
        trainer = trl.DPOTrainer(
            model=model, args=args, train_dataset=pairs, processing_class=tokenizer, peft_config=peft
        )
        _start(trainer.model)

        def go(begin: Callable[[], None], end: Callable[[], None]) -> list[float]:
            return _train(trainer, begin, end, work.warm_up)

        return Built(go)


@dataclass(frozen=True)
class _DpoCli:
    """The product's own trainer, as `dpo-cli train` builds it."""

    micro_batch: int
    engine: dict[str, str]

    def __call__(self, work: Work) -> Built:
        from dpo_cli import backends
        from dpo_cli.run import Run
        from dpo_cli.train.engine import cache_reference, choose
        from dpo_cli.train.shared_prefix import install
        from dpo_cli.train.trainer import build

        recipe = recipe_of(work, self.micro_batch, self.engine)
        trainer = build(recipe, Run(work.folder), backends.Backend(work.backend, "the benchmark"))
        chosen = choose(recipe, trainer, None, lambda line: None)
        cache_reference(recipe, trainer, work.folder.parent, None, lambda line: None)
        shared = install(trainer.model, work.backend == "unsloth") if chosen.shared_prefix else None  # that it has
        _start(trainer.model)
        return Built(lambda begin, end: _train(trainer, begin, end, work.warm_up), shared, chosen.token_budget)


def recipe_of(work: Work, micro_batch: int, engine: dict[str, str], **train: Any) -> Any:
    from dpo_cli.recipe import Recipe

    on_gpu = work.device == "cuda"
    budget = {"token_budget": work.token_budget} if engine["token_budget"] == "auto" else {}
    return Recipe.model_validate(
        {
            "name": re.sub(r"\W+", "_", work.folder.name),
            "seed": work.seed,
            "model": {
                "id": str(work.model),
                "load_in_4bit": on_gpu,
                "dtype": "bfloat16" if on_gpu else "float32",
                "max_length": work.max_length,
            },
            "lora": {"r": work.rank, "alpha": 2.0 * work.rank, "dropout": 0.0, "target_modules": list(TARGETS)},
            "data": {"sources": [{"id": "unused"}]},
            "train": {
                "per_device_train_batch_size": micro_batch,
                "gradient_accumulation_steps": work.step_pairs // micro_batch,
                "max_steps": work.warm_up + work.steps,
                "learning_rate": work.learning_rate,
                "beta": work.beta,
                "max_grad_norm": 0.0,
                "train_sampling_strategy": "sequential",
                "logging_steps": 1,
                "save_strategy": "no",
            }
            | train,
            "engine": {"backend": work.backend, "preflight": False} | engine | budget,
        }
    )


def _train(trainer: Any, begin: Callable[[], None], end: Callable[[], None], warm_up: int) -> list[float]:
    from transformers import PrinterCallback, ProgressCallback

    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    trainer.add_callback(_marks(begin, end, warm_up))
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


# -------------------------------------------------------------------------------------------------------------- pieces


def _lora(rank: int) -> dict[str, Any]:
    return {
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "target_modules": list(TARGETS),
        "task_type": "CAUSAL_LM",
    }


def _base(work: Work) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if work.device == "cpu":
        return AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        work.model, dtype=torch.bfloat16, quantization_config=nf4, device_map={"": 0}
    )


def _tokenizer(work: Work) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(work.model)


def _unsloth(work: Work, checkpointing: bool) -> tuple[Any, Any]:
    """Model and tokenizer through Unsloth, for TRL's script on it."""
    from dpo_cli import backends, models

    recipe = recipe_of(work, 1, NOTHING, gradient_checkpointing=checkpointing)
    return models.load_for_training(recipe, backends.Backend("unsloth", "the benchmark"))


def _start(model: Any) -> None:
    """Give the policy's adapter the weights that every contender starts from: by name, and B not zero."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))


def random_qwen3(shape: Shape, device: str, dtype: Any, **special_tokens: Any) -> Any:
    """A Qwen3 of random weights, made in its dtype: 4B in float32 would not fit into 16 GB."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        **special_tokens,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def make_model(folder: Path, shape: Shape, device: str = "cpu") -> Path:
    """Write a Qwen3 of random weights, and a tokenizer whose token i is the word `wi`, unless they are there."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if (folder / "tokenizer.json").is_file():
        return folder
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    random_qwen3(shape, device, dtype, pad_token_id=0, eos_token_id=1).save_pretrained(folder)
    special = ["<pad>", "<eos>", "<unk>"]
    words = special + [f"w{number}" for number in range(len(special), shape.vocabulary)]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=8192
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message.content + ' ' }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def write_pairs(work: Work) -> Work:
    """The pairs as `dpo-cli prepare` leaves them, in `data/train.jsonl`; the tokenizer makes one token of a word."""
    from dpo_cli.records import Pair, write_jsonl

    def message(role: str, ids: list[int]) -> list[Any]:
        return [{"role": role, "content": " ".join(f"w{number}" for number in ids)}]

    path = work.folder / "data" / "train.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (
        Pair(
            id=str(number),
            prompt=message("user", pair.prompt),
            chosen=message("assistant", pair.chosen),
            rejected=message("assistant", pair.rejected),
            language="en",
            source="random",
            chat_template_kwargs={"enable_thinking": False},
        ).to_json()
        for number, pair in enumerate(work.pairs)
    )
    write_jsonl(path, rows)
    return work
