"""Records to packed batches: record → Sample → Batch."""
