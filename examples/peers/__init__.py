"""Adapters: each page certifies one library's functions, as that library calls them."""
