"""The tables and plots of arXiv:1812.02407 over again."""
