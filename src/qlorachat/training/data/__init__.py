"""A data set becomes token ids, and every micro-batch of a run."""
