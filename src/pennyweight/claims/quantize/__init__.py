"""Claims about quantization."""
