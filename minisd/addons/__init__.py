"""What is layered on a checkpoint: LoRAs, embeddings, controls."""
