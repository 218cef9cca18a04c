"""Solvers of one matrix that several levers share: pure functions of tensors, below the levers."""
