"""A checkpoint's chat template: found and compiled, sandboxed, laid out, written as ids."""
