"""Neural building blocks that more than one family wants. Knows no family, no replay, no optimiser schedule."""
