"""`eval`: did it get better, by how much, and how sure are we."""
