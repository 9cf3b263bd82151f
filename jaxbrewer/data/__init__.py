"""Batches and the order in which they come."""

from .buckets import bucket_by_length
from .masking import mask_words

__all__ = ["bucket_by_length", "mask_words"]
