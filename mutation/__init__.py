"""The mutation gate: wrong variants of the mathematics, each of which some test must refuse (`make mutants`)."""
