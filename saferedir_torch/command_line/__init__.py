"""The commands of `python -m saferedir_torch`. They alone choose between the embedded world and a user's own prompts."""
