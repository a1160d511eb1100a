"""The kinds of subject, by family: signature, oracle, conventions and laws of each."""
