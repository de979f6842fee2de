"""Learning from data: fit a model and its guide, and evaluate them in a stated protocol."""
