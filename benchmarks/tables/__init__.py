"""One module a table of the evaluation."""
