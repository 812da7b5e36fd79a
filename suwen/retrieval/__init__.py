"""Retrieval: documents to passages, an index on disk, prompts with numbered passages, and checked citations."""
