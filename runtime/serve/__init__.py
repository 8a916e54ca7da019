"""The image service: the batcher behind an address. Needs the extra `serve`."""
