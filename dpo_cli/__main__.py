"""`python -m dpo_cli` is the same program, which is how `accelerate launch -m dpo_cli` starts it."""

from dpo_cli.cli import main

if __name__ == "__main__":
    main()
