"""Think before drawing: enhancers that write thinking records, how records are shown, and learned thinking tokens."""
