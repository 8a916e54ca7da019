"""Attacks on anything that is meant to keep a model from drawing a concept."""
