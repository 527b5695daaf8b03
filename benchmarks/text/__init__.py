"""Text under schemes that exchange rarely: loss against updates, bytes, and wall time on slow links."""
