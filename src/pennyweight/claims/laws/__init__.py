"""Claims about laws and training."""
