"""Whole-file jobs: convert, quantize, slice, diff. Streaming and atomic, the same bytes for any number of threads."""
