"""What checkpoints are worked on with: inspecting, comparing, merging, converting; and what this machine has for it."""
