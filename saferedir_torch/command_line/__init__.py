"""The commands of `saferedir`. They alone choose between the embedded world and a user's own prompts."""
