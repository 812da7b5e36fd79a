"""Retrieval: documents to passages, an index on disk, and prompts with numbered passages whose citations are checked."""
