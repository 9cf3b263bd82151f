"""Batches and the order in which they come."""

from .buckets import bucket_by_length

__all__ = ["bucket_by_length"]
