"""Measurements beside peers and physical limits; proofs of learning. `python -m bench NAME`."""

import learner as learner  # before torch, whose threads it tells how to wait
