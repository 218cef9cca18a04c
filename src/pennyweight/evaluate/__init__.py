"""How good a model is: one value a sample, so that `pennyweight.measure.stats` can pair them."""
