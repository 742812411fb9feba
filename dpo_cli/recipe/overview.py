"""What a recipe will do, in a line a stage, for `dpo-cli check`."""

from __future__ import annotations

from dpo_cli.recipe import Recipe


def overview(recipe: Recipe) -> list[str]:
    """Say in one line each what `prepare`, `train`, `eval` and `export` will do, and where."""
    data, train, wanted = recipe.data, recipe.train, recipe.export
    sources = ", ".join(source.label for source in data.sources)
    shares = ", ".join(f"{name} {share:.0%}" for name, share in (data.languages or {}).items())
    size = f"{data.total:,} {data.format}" if data.total else f"all {data.format}"
    model = recipe.model
    weights = "4-bit" if model.load_in_4bit else "16-bit" if model.dtype != "float32" else "float32"
    step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    length = f"{train.max_steps:,} steps" if train.max_steps > 0 else _counted(train.num_train_epochs, "epoch")
    losses = "+".join(train.losses)
    learns = f"{train.method} ({losses})" if losses and losses != train.method else train.method
    beta = getattr(train, "beta", None)
    judge = recipe.eval.judge
    sets = f"; scored on {', '.join(one.label for one in recipe.eval.sets)} too" if recipe.eval.sets else ""
    judged = f"judged by {getattr(judge, 'model', None) or getattr(judge, 'id', '')}" if judge else "no judge"
    lines = {
        "data": f"{sources}: {size}{f' ({shares})' if shares else ''}, {data.eval_fraction:.0%} held out",
        "model": f"{model.id}, {weights}, LoRA r {recipe.lora.r}, at most {model.max_length:,} tokens",
        "train": f"{learns}{f', beta {beta:g}' if beta is not None else ''}, {length}, {step} a step, "
        f"learning rate {train.learning_rate:g}",
        "eval": f"{recipe.eval.prompts} prompts answered by both models, {judged}{sets}",
        "export": ", ".join(wanted.formats) + (f" ({wanted.gguf})" if "gguf" in wanted.formats else ""),
        "run": f"runs/{recipe.name}/",
    }
    return [f"  {name:<7} {line}" for name, line in lines.items()]


def _counted(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"
