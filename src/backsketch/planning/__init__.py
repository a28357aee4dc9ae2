"""Planning: profiles, plans, controllers, and benchmarks."""
