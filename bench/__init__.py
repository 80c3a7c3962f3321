"""Measurements beside peers and physical limits; proofs of learning. `python -m bench NAME`."""
