"""What a run loses with its ranks."""
