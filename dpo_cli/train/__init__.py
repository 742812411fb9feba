"""`train`: pairs -> a LoRA adapter, with TRL's own trainer and losses."""
