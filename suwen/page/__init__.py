"""The chat page: what answers behind it, and how it looks."""
