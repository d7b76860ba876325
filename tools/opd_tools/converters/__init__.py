"""Foreign formats: one module each, and what turns their rows into rollouts and back."""
