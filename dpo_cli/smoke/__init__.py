"""What `builtin:` ids name: a small Qwen3, a reward model and preference data, all files of this package.

tests/tools makes them: make_tiny_qwen3, make_style_reward and smoke_data.
"""

from pathlib import Path

from dpo_cli.errors import DpoError, did_you_mean

MODEL, REWARD_MODEL = "builtin:tiny-qwen3", "builtin:style-reward"
SETS = ("builtin:style-ultrafeedback-en", "builtin:style-ultrafeedback-zh", "builtin:style-helpsteer2")
BUILTINS = (MODEL, REWARD_MODEL, *SETS)


def resolve(builtin_id: str) -> Path:
    """Return the path behind a built-in id: a folder for a model, a .jsonl.gz file for preference data.

    Raises:
        DpoError: no such id.
    """
    if builtin_id not in BUILTINS:
        near = did_you_mean(builtin_id, list(BUILTINS))
        raise DpoError(
            f"There is no {builtin_id}.",
            hint=(f"did you mean {near}? " if near else "") + f"The built-in ids are {', '.join(BUILTINS)}.",
        )
    name = builtin_id.removeprefix("builtin:")
    return Path(__file__).parent / (f"{name}.jsonl.gz" if builtin_id in SETS else name)
