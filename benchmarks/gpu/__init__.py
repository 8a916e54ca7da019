"""What safety costs on a GPU: milliseconds of a denoising step with and without it, of three models, beside eager PyTorch."""
