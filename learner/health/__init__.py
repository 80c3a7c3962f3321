"""Is the learning healthy? Figures of every update, limits, alarms that name a cause and a remedy."""
