"""What `align_smollm2.py` aligns to: two goals that a program checks, prompts, sizes, the report."""
