"""Text for pre-training: documents and packed tokens (text.py), and the vocabulary (tokenizer.py)."""
