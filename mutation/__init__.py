"""The mutation gate: wrong variants of the mathematics, each refused by some test (`make mutants`)."""
