"""The long proofs. `make prove` runs them whole; `make test` a slice of them, another one with each commit."""
