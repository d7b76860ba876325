"""The `opd` command: one module per verb."""
