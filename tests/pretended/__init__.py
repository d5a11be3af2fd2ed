"""A pretended GPU, on which mistakes with devices show without a GPU."""
