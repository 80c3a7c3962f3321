"""Experience into weights: world-model families, the update loop, publishing and checkpoints. The only room with torch."""
