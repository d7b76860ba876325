"""What a batch contributes to the loss, and what is watched."""
