"""`python on_cpu.py train …`: dpo-cli on the real Unsloth without a GPU, all of it but the loading of the weights.

Unsloth loads no model without CUDA, so transformers loads it here. The rest is real: the import before TRL, Unsloth's
trainer and config in TRL's place, and the adapters, checkpoints and resumes that they handle. TRL 1.15's own Triton
kernel runs in Triton's interpreter: TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os


def patch_trl() -> None:
    """Replace TRL's classes, as `import unsloth` does by itself where it is not told to do without a GPU."""
    from unsloth.models.rl import PatchFastRL

    allowed = os.environ.pop("UNSLOTH_ALLOW_CPU")
    PatchFastRL()
    os.environ["UNSLOTH_ALLOW_CPU"] = allowed


if __name__ == "__main__":
    import unsloth  # noqa: F401

    patch_trl()
    from dpo_cli import models
    from dpo_cli.cli import main

    models._load_unsloth = models._load_hf
    main()
