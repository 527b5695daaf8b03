"""Training over slow links, each rank in a network namespace of its own."""
