"""Prompts of language models: messages and templates, plain text, positions, and the packaged model."""
