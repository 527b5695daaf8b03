"""What GossipMonitor costs."""
