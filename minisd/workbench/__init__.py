"""What checkpoints are worked on with: inspecting, comparing, merging, converting."""
