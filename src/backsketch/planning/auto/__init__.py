"""Auto: finds, times and controls the sketches of a training while it runs."""
