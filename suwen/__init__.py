"""Suwen 素问: from a base language model and medical knowledge to a medical model that is measured, served and trusted."""

__version__ = "0.1.0"
