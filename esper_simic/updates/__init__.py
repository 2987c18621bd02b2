"""One module per algorithm: from a batch of experience to one update of the weights."""
