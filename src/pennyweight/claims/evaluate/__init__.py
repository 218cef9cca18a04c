"""Claims about measuring and evaluating."""
