"""What other projects' trainers keep log-probs in."""
