"""Pure torch operations, each with a slow reference."""
