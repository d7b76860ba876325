"""From prompts to rollouts to a scored cache."""
