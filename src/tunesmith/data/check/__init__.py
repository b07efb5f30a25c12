"""Checks on data: what looks wrong in texts, answers, columns and labels, before training."""
