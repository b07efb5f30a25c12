"""Answers sampled in training: drawn, judged, kept, and packed into batches."""
