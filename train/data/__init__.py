"""Corpora, documents, prompts and batches."""
