"""Publishing and fetching."""
