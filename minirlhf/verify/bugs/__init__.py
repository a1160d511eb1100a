"""The zoo of known bugs, by family: right implementations and the lines that go wrong in them."""
