"""Benchmarks of lm-eval, on the model in training and on models that are on disk."""
