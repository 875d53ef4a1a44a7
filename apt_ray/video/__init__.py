"""Frames that follow one another: which of them are inspected, and what their scores mean in time.

Nothing here imports torch or waits for anything: `Watch` is told of frames and scores by whoever
has them, the command line (`cli/inspect.py`) or the fleet.
"""
