"""From a file of prompts to many pictures, on machines that die.

In the order of the data: manifest (lines to records), rows (records to what is drawn, or why not), shards (what is missing, in
pieces that belong together), workers (who draws them), drawing (rows to pictures), formats and store (files that are written
whole), running (the loop over all that); job is what all rows have in common, on_ray the same on a cluster.
"""

from .on_ray import draw_rows

__all__ = ["draw_rows"]
