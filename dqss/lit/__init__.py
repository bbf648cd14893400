"""Lightning modules and the runs that they make: search, training."""
