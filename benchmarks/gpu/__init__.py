"""What is said about CUDA, tried on one GPU: exactness, streams, speed; and its rehearsal on a CPU."""
