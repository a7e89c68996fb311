"""A .ckpt as `torch.save` writes it, zip or older, read without running it: torch_file.py (where the tensors lie), then
pickled.py (the few instructions of pickle that describe them)."""
