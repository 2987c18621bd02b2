"""What a run shows to others' tools: TensorBoard's files, and Prometheus over HTTP."""
