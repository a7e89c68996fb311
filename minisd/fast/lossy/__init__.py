"""What is sooner and less exact, and off unless asked for: float8 weights and activations, and the deep part of a UNet reused."""
