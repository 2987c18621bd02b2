"""What runs in the child processes. The only modules of this package that import torch."""
