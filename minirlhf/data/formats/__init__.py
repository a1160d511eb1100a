"""The formats of instruction and preference data, and which one a file is in."""
