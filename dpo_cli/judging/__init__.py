"""Who says which of two answers is better: the judges of `eval`."""
