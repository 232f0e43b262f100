"""Language models: tokens in, a distribution over the next one out."""
