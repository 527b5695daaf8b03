"""What a large frozen base costs in validations and checkpoints."""
