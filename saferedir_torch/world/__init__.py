"""emoji-diffusion: the small, real latent diffusion model that the project trains, ships and tests on."""
