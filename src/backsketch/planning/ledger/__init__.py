"""What each site adds to the variance of the gradient."""
