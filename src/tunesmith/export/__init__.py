"""Results that other programs load."""
