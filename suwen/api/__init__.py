"""An OpenAI-compatible server for a few people; vLLM serves the same models, with the same client, to many."""
