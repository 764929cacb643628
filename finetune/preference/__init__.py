"""Learning from what people prefer: candidates, comparisons, reward models, policy optimisation, best-of-N."""
