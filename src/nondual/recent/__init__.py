"""Recent answers to what stays fixed in a transformer: its weights, its depth, and the path through its layers."""
