"""`export`: the file you ship is the model you evaluated."""
