"""What each sketch would cost and save at each site of a model."""
