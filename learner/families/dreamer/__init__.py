"""DreamerV3 (Hafner et al., Nature 2025; arXiv 2301.04104): config, world model, behavior, agent, policy."""
