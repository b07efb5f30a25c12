"""Any format in, packed batches out."""
