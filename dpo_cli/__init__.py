"""dpo-cli: one YAML recipe and four commands from raw preference data to a verified, aligned Qwen3."""

__version__ = "0.2.0"
