"""Suwen 素问: from a base language model and medical knowledge to a medical model you can trust."""

__version__ = "0.1.0"
