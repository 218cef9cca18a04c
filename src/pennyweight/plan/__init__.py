"""From budget to recipe."""
