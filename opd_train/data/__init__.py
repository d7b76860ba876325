"""From a cache to batches on a device: what comes when, and how it gets there."""
