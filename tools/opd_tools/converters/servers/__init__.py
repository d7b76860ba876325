"""What inference servers answer."""
