"""Text for pre-training: documents (sources.py), tokens (tokenizer.py), packed blocks (pack.py)."""
