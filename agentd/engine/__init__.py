"""The model: load, prompt format, constrained decoding; its process and the link to it."""
