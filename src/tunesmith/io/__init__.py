"""Files that are whole, locked and verified."""
