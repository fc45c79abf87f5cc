"""What evaluate.py measures with, and how it tells the result."""
