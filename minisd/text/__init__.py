"""From words to what conditions the UNet.  Read tokenizer, conditioner; then grammar, chunks, prompts, which prompts come by."""
