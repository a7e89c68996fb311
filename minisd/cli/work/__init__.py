"""The commands for much work: `minisd batch`, from a file of prompts to many pictures, and `minisd score`, which judges them."""
