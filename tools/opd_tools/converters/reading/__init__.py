"""How JSON, tables, tensors and text are read, whatever format they are in."""
