"""Policy weights on the move: versioned, digest-checked, pulled by actors, published by the learner alone."""
