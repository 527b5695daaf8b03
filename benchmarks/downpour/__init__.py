"""What a parameter server costs, what it does about stragglers, and how accurate its model gets."""
