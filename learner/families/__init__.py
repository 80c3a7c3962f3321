"""One package per world-model family; they know `learner.nn` and the contracts, never each other."""
