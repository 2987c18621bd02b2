"""What acts and is learned: encoders of graphs and vectors, cores, heads, values, critics, normaliser, adapters."""
