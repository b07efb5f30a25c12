"""Models: finding, loading, adapting, sizing."""
