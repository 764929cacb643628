"""What judges a picture: measured qualities, heads trained on comparisons, ready-made models, and weighted sums of them."""
