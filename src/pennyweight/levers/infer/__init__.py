"""Levers that change how a model is run: what it keeps between tokens, and what it computes."""
