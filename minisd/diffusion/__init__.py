"""The mathematics of diffusion, without networks.  Read schedule, denoiser, samplers/one_step."""
