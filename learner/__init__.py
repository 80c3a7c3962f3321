"""Experience into weights: families, update loop, publishing, checkpoints. The only room with torch."""

import os

# Read when torch is loaded: how often its threads look for the next operation before they sleep. Its own
# 300,000 turns burn processors that actors, replay and the learner's lanes want: on two cores beside two
# busy processes an update took 2.0 s, and 1.1 s with 20,000 turns; alone 0.51 s and 0.60 s.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
