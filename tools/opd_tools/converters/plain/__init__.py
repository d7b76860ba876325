"""Tables, JSON lines and tensors without a project behind them, and what a cache becomes in them."""
