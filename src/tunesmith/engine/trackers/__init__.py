"""Trackers: where the event stream of a run goes besides its own directory.

A tracker never stops or slows a run. Its calls are made on a thread of its own; one that fails,
or does not come back, is told of once and left alone. `events.jsonl` stays the truth: what a
tracker missed it gets when the run goes on.
"""
