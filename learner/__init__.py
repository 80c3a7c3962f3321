"""Experience into weights: families, update loop, publishing, checkpoints. The only room with torch."""
