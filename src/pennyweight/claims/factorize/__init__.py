"""Claims about factors and shared parameters."""
