"""Rules of optimizers: each says how one group of parameters is updated, and what it remembers."""
