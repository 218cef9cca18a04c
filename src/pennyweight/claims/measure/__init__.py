"""Claims about what models cost."""
