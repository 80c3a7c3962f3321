"""Neural building blocks that more than one family wants. Knows no family and no replay."""
