"""Claims about merging."""
